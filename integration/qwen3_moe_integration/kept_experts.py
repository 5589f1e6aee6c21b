"""Experts in a layer that is computed twice: the kernel can keep for the second time what backward reads.

Sorting the tokens, the gate and up projections and the adapters are then done once. The down projection always is: a
Qwen3-MoE's layer ends by adding the experts' result, so no gradient reads it.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import Optional

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer

from .exchange import without_results
from .experts import kernel_of

Tensor = torch.Tensor


class Experts:
    """Computed both times, but for their result the second time."""

    tensors: tuple[Tensor, ...] = ()

    def __init__(self, kernel: ModuleType):
        self._kernel = kernel

    def move(self, like: Callable[[Tensor], Tensor]) -> None:
        pass

    def forward(self) -> AbstractContextManager:
        return nullcontext()

    @contextmanager
    def recomputation(self) -> Iterator[None]:
        with without_results(), self._for_gradients():
            yield

    def _for_gradients(self) -> AbstractContextManager:
        return self._kernel.for_gradients()


class KeptExperts(Experts):
    """Computed the first time alone, if the kernel has ``keeping``."""

    def __init__(self, kernel: ModuleType):
        super().__init__(kernel)
        self._kept: list[tuple[Optional[Tensor], ...]] = []

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(tensor for call in self._kept for tensor in call if tensor is not None)

    def move(self, like: Callable[[Tensor], Tensor]) -> None:
        self._kept = [tuple(None if tensor is None else like(tensor) for tensor in call) for call in self._kept]

    def forward(self) -> AbstractContextManager:
        return self._kernel.keeping(self._kept)

    def _for_gradients(self) -> AbstractContextManager:
        return self._kernel.for_gradients(self._kept)


def kernel_with_experts(layer: nn.Module) -> Optional[ModuleType]:
    """The kernel that runs a layer's experts, if that can leave out their result and the layer lets it."""
    experts = getattr(layer.mlp, "experts", None) if isinstance(layer, Qwen3MoeDecoderLayer) else None
    if isinstance(experts, BaseTunerLayer):
        experts = experts.get_base_layer()
    kernel = kernel_of(experts) if experts is not None else None
    return kernel if hasattr(kernel, "for_gradients") else None
