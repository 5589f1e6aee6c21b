"""What a recorded layer keeps from its forward, so that its backward need not compute it again.

It lies in memory that belongs to the one recording: forward's graph writes to it and backward's reads it, and nothing
is copied on the way but attention's results, once. The memory of the graphs themselves would not do. All recordings
share it, and one that was made earlier writes to what a later one has left there.
"""

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol

import torch
from torch import nn

from .kept_attention import KeptAttention
from .kept_experts import Experts, KeptExperts, kernel_with_experts

Tensor = torch.Tensor

KEEPABLE = ("attention", "experts")


class Part(Protocol):
    """Of a layer that is called in one form, first without gradients, then again for them."""

    tensors: tuple[Tensor, ...]
    """What is kept."""

    def forward(self) -> AbstractContextManager:
        """Around the first call, which makes memory for what it keeps; when it is repeated, it writes to the same."""

    def recomputation(self) -> AbstractContextManager:
        """Around the second call, which takes what is kept."""


class Kept:
    """A ``Part`` that has all the parts of a layer.

    Args:
        layer: a decoder layer.
        names: those of ``KEEPABLE`` that are kept, if the layer has them.
    """

    def __init__(self, layer: nn.Module, names: Collection[str]):
        self._parts: list[Part] = [KeptAttention()] if "attention" in names else []
        kernel = kernel_with_experts(layer)
        if kernel is not None:
            keeps = "experts" in names and hasattr(kernel, "keeping")
            self._parts.append((KeptExperts if keeps else Experts)(kernel))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(tensor for part in self._parts for tensor in part.tensors)

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
