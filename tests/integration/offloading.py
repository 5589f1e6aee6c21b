"""Models whose layers, in graphs, offload what they keep; and what of their recordings tests look at."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from qwen3_moe_integration import enable_graphed_checkpointing
from qwen3_moe_integration.kept import KEEPABLE
from qwen3_moe_integration.offload import Offloaded, Places
from qwen3_moe_integration.recording import Recording
from tests.integration.graphs import checkpoint_of, layers, trainable
from tests.integration.lora import config, pair
from tests.integration.models import Tiny


def in_graphs(model: nn.Module, offload=KEEPABLE) -> nn.Module:
    return enable_graphed_checkpointing(model, keep=KEEPABLE, offload=offload)


def model_of(source, device: str, count: int = 4, **sizes: Any) -> nn.Module:
    """With ``count`` layers, and adapters in all of them."""
    model = pair(source, config(), tiny=Tiny("qwen3_moe", {"num_hidden_layers": count, **sizes}))[0]
    return model.to(device, torch.bfloat16 if device == "cuda" else torch.float32)


def twins_of(source, device: str, count: int = 4, offload=KEEPABLE, **sizes: Any) -> tuple[nn.Module, nn.Module]:
    """Two models with the same weights and adapters, that keep the same: offloaded, and on the device."""
    model = model_of(source, device, count, **sizes)
    other = copy.deepcopy(model)
    return in_graphs(model, offload), in_graphs(other, ())


def places_of(model: nn.Module) -> Places:
    (device,) = checkpoint_of(layers(model)[0])._devices.values()
    return device.places


def recordings_of(model: nn.Module) -> list[Recording]:
    known = checkpoint_of(layers(model)[0])._known.values()
    return [variant.recording for each in known for variant in each.variants if variant.recording]


def offloaded_of(model: nn.Module) -> list[Offloaded]:
    return [recording._offloaded for recording in recordings_of(model)]


def assert_same_gradients(models: tuple[nn.Module, nn.Module], run: Callable[[nn.Module], None]) -> None:
    """After ``run`` of each."""
    for model in models:
        model.zero_grad()
        run(model)
    for (name, parameter), (_, other) in zip(*map(trainable, models)):
        assert torch.equal(parameter.grad, other.grad) and parameter.grad.abs().sum() > 0, name


def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(input_ids=batch, labels=batch).loss
