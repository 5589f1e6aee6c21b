"""What is trained on two ranks and, with the same numbers, in one process."""

import copy
from pathlib import Path
from typing import Optional

import torch
from peft import LoraConfig, get_peft_model
from torch import distributed, nn

from qwen3_moe_integration import MoeBitsAndBytesConfig, kernelize_model, register
from tests.integration import lora, quantized
from tests.integration.models import GPU_RATIO, QWEN3, RATIO, tokens
from tests.kernel.oracle import assert_close

Tensor = torch.Tensor

ATTENTION = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
KINDS = ("dense", "attention", "experts", "4 bit")
"""Trained: all weights; adapters of attention; adapters of attention and of every expert, over weights in 4 bit too."""
FOUR_BIT = MoeBitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_storage=torch.bfloat16)


def base_model(kind: str, source, checkpoint: Path) -> nn.Module:
    """On the kernel; ``checkpoint`` is what experts in 4 bit are made of."""
    if kind == "4 bit":
        register(source)
        return quantized.load(checkpoint, FOUR_BIT, dtype=torch.float32)
    return kernelize_model(QWEN3.build(), kernel=source)


def small_model(kind: str, source, checkpoint: Path) -> nn.Module:
    model = base_model(kind, source, checkpoint)
    if kind == "attention":
        model = get_peft_model(model, ATTENTION)
    elif kind in ("experts", "4 bit"):
        model = lora.with_adapters(model, lora.config())
    return model.train()


def with_checkpointing(model: nn.Module) -> nn.Module:
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def batch_and_share(rows: int = 2, length: int = 5, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """A batch, the same on all ranks, and this rank's rows of it."""
    batch = tokens(rows, length, device)
    return batch, shares(batch)[distributed.get_rank()]


def shares(batch: Tensor) -> tuple[Tensor, ...]:
    """All ranks' rows of it."""
    return batch.chunk(distributed.get_world_size())


def loss(model: nn.Module, input_ids: Tensor) -> Tensor:
    return model(input_ids=input_ids, labels=input_ids, use_cache=False).loss


def step(model: nn.Module, input_ids: Tensor) -> Tensor:
    """One step of training; returns the loss, averaged over the ranks if the model is sharded over them."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    value = loss(model, input_ids)
    value.backward()
    optimizer.step()
    return value.detach()


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def average(value: Tensor) -> Tensor:
    total = value.clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()


def assert_all_close(want: dict[str, Tensor], got: dict[str, Tensor], ratio: Optional[float] = None) -> None:
    """``ratio`` is by default what two ways to compute fp32 may differ by on the device."""
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert_close(name, tensor, got[name], ratio or (GPU_RATIO if tensor.is_cuda else RATIO))


def twins(kind: str, source, checkpoint: Path) -> tuple[nn.Module, nn.Module]:
    """Two models with the same weights: one to train alone, one to train with the other ranks."""
    model = small_model(kind, source, checkpoint)
    return copy.deepcopy(model), model
