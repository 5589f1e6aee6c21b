"""Attention's linear layers in a layer that is computed twice, if they are in 4 bit with LoRA: computed the first time.

What their backward reads is their input, which is computed again, and the low-rank product. Their results are what
norms and attention read in backward. Both are written where they are kept, not copied, and given as they are: so
nothing may change them in place. In a layer of Qwen3-MoE nothing does. Liger's rotary embeddings write to what they
are given, but there they come after norms, with results of their own; other models rotate the projections themselves.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer

from .lora_linear import Products, products_from

Tensor = torch.Tensor


class KeptProjection:
    """One of these linear layers, if ``lora_linear`` computes it with its adapter; PEFT's calls are computed twice. A
    ``kept.Part``."""

    def __init__(self, linear: nn.Module):
        self._linear = linear
        self._kept: list[tuple[tuple, Products]] = []  # forms of calls and their products, as they were called

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(x for _, products in self._kept for x in products)

    def move(self, like: Callable[[Tensor], Tensor]) -> None:
        self._kept = [(form, tuple(like(x) for x in products)) for form, products in self._kept]

    def forward(self) -> AbstractContextManager:
        first, places = not self._kept, iter(self._kept[:])

        def keep(form: tuple, compute: Callable[..., Products]) -> Products:
            kept_form, place = next(places, (None, None))
            products = compute(place if kept_form == form else None)
            if first:
                self._kept.append((form, products))
            return products

        return products_from(self._linear, keep)

    def recomputation(self) -> AbstractContextManager:
        left = iter(self._kept)

        def give(form: tuple, compute: Callable[..., Products]) -> Products:
            kept_form, products = next(left, (None, None))
            if kept_form != form:
                return compute()
            out, low = products
            return out.detach(), low.detach()  # or autograd would take what is kept for the result of this one call

        return products_from(self._linear, give)


def keeps_projections(layer: nn.Module) -> bool:
    """Whether a layer, as far as is known, changes none of them in place."""
    return isinstance(layer, Qwen3MoeDecoderLayer)
