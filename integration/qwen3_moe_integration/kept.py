"""What a recorded layer keeps from its forward, so that its backward need not compute it again.

It lies in memory that belongs to the one recording: forward's graph writes to it and backward's reads it, and nothing
is copied on the way but attention's results, once. The memory of the graphs themselves would not do. All recordings
share it, and one that was made earlier writes to what a later one has left there. What is offloaded (see ``offload``)
moves to memory that recordings take in turn.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol

import torch
from torch import nn

from .kept_attention import KeptAttention
from .kept_experts import Experts, KeptExperts, kernel_with_experts
from .kept_projections import KeptProjection, keeps_projections

Tensor = torch.Tensor

KEEPABLE = ("attention", "experts", "o_proj", "k_proj", "v_proj", "q_proj")


class Part(Protocol):
    """Of a layer that is called in one form, first without gradients, then again for them."""

    tensors: tuple[Tensor, ...]
    """What is kept."""

    def move(self, like: Callable[[Tensor], Tensor]) -> None:
        """What is kept will lie in other memory: ``like`` gives it for each of ``tensors``, in their order. Nothing is
        copied to it."""

    def forward(self) -> AbstractContextManager:
        """Around the first call, which makes memory for what it keeps; when it is repeated, it writes to the same."""

    def recomputation(self) -> AbstractContextManager:
        """Around the second call, which takes what is kept."""


class Kept:
    """A ``Part`` that has all the parts of a layer.

    Args:
        layer: a decoder layer.
        names: those of ``KEEPABLE`` that are kept, if the layer has them.
        offload: those of ``names`` that move, if any do.
    """

    def __init__(self, layer: nn.Module, names: Collection[str], offload: Collection[str] = ()):
        parts: dict[str, Part] = {"attention": KeptAttention()} if "attention" in names else {}
        kernel = kernel_with_experts(layer)
        if kernel is not None:
            keeps = "experts" in names and hasattr(kernel, "keeping")
            parts["experts"] = (KeptExperts if keeps else Experts)(kernel)
        if keeps_projections(layer):
            linears = layer.self_attn.named_children()
            parts |= {name: KeptProjection(linear) for name, linear in linears if name in names}
        self._parts = list(parts.values())
        self._offloaded = [part for name, part in parts.items() if name in offload]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return _tensors(self._parts)

    @property
    def offloaded(self) -> tuple[Tensor, ...]:
        """Those of ``tensors`` that ``move`` moves."""
        return _tensors(self._offloaded)

    def move(self, like: Callable[[Tensor], Tensor]) -> None:
        for part in self._offloaded:
            part.move(like)

    @contextmanager
    def forward(self) -> Iterator[None]:
        with ExitStack() as stack:
            for part in self._parts:
                stack.enter_context(part.forward())
            yield

    @contextmanager
    def recomputation(self) -> Iterator[None]:
        with ExitStack() as stack:
            for part in self._parts:
                stack.enter_context(part.recomputation())
            yield


def _tensors(parts: list[Part]) -> tuple[Tensor, ...]:
    return tuple(tensor for part in parts for tensor in part.tensors)
