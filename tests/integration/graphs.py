"""CUDA graphs for a CPU, recorded by keeping the work and replayed by doing it again; and steps of training in them."""

from collections.abc import Callable, Iterator
from typing import Any, Optional

import pytest
import torch
from peft import PeftModel
from torch import nn

from qwen3_moe_integration import graphed, recording
from qwen3_moe_integration.offload import Claim, Offloaded, Places


class Redone:
    """Takes the place of a device and of its random numbers, and keeps where these stood whenever work was done."""

    def __init__(self, device: torch.device):
        self.generator = self
        self.buffers, self.places = recording.Buffers(), Places(device)
        self.recorded = self.offset = 0
        self.offsets: list[int] = []
        made.append(self)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1

        def replay() -> None:
            self.offsets.append(self.offset)
            self.offset += 4
            work()

        return replay

    @property
    def replayed(self) -> int:
        return len(self.offsets)

    def get_offset(self) -> int:
        return self.offset

    def set_offset(self, offset: int) -> None:
        self.offset = offset


made: list[Redone] = []
"""Since the last :func:`stand_in`."""


def stand_in(setattr: Callable[[Any, str, Any], None] = setattr) -> None:
    """Has graphs recorded on the CPU from now on; ``setattr`` may be one that undoes what it did."""
    made.clear()
    setattr(graphed, "Device", Redone)
    setattr(graphed, "_can_record", lambda device: True)


def empty_places(setattr: Callable[[Any, str, Any], None] = setattr) -> None:
    """What is offloaded is gone from its place once it was copied: what backward reads can only come from the host."""
    store = Offloaded.store

    def store_and_forget(self, claim: Claim) -> None:
        store(self, claim)
        self.places.catch_up()
        self.places.wait(self.place.left)
        self.place.memory.zero_()
        self.place.holder = lambda: None

    setattr(Offloaded, "store", store_and_forget)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch) -> str:
    """Where graphs are recorded; no warning was given before."""
    if request.param == "cpu":
        stand_in(monkeypatch.setattr)
    graphed._warn_once.cache_clear()
    return request.param


def recordings(model: nn.Module) -> int:
    """How many forms of calls were recorded, of all layers together."""
    (checkpoint,) = {id(c): c for c in map(checkpoint_of, layers(model))}.values()
    return sum(variant.recording is not None for known in checkpoint._known.values() for variant in known.variants)


def kept(model: nn.Module) -> list[tuple[torch.Tensor, ...]]:
    """What each recording keeps from forward to backward."""
    known = checkpoint_of(layers(model)[0])._known.values()
    return [v.recording.kept.tensors for each in known for v in each.variants if v.recording]


def layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers, of a model that PEFT has wrapped too."""
    return (model.get_base_model() if isinstance(model, PeftModel) else model).model.layers


def checkpoint_of(layer: nn.Module) -> graphed.GraphedCheckpoint:
    return layer._gradient_checkpointing_func


def assert_same_steps(
    graphed_model: nn.Module, usual: nn.Module, batches: list[torch.Tensor], autocast: Optional[torch.dtype] = None
) -> None:
    """Losses, gradients and weights are the same to the last bit through steps of training."""
    models = graphed_model, usual
    trained = [dict(trainable(model)) for model in models]
    optimizers = [torch.optim.SGD(each.values(), lr=0.1) for each in trained]
    for number, batch in enumerate(batches):
        losses = []
        for model in models:
            torch.manual_seed(number)
            with torch.autocast(batch.device.type, autocast, enabled=autocast is not None):
                loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            losses.append(loss.detach())
        assert torch.equal(*losses), f"step {number}"
        for name, parameter in trained[0].items():
            other = trained[1][name]
            assert parameter.grad is not None and torch.equal(parameter.grad, other.grad), f"step {number}: {name}"
            assert parameter.grad.abs().sum() > 0, f"step {number}: {name}"
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
