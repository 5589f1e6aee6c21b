"""Low-rank factors: what an adapter adds to one weight, or to a stack of experts' weights.

Of an expert projection the factors are each expert's own LoRA, stacked. Every layout of adapters is read into this
form and written from it.
"""

import math
from dataclasses import dataclass, replace

import torch

Tensor = torch.Tensor


@dataclass(frozen=True)
class Factors:
    """The addition ``scaling * B @ A``.

    Args:
        A: (r, in) of a linear layer, (E, r, in) of a stack of experts.
        B: (out, r) or (E, out, r).
        scaling: what PEFT derives from alpha and rank, by whichever of its two rules.
    """

    A: Tensor
    B: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return self.A.shape[-2]

    def alpha(self, rslora: bool) -> float:
        """The ``lora_alpha`` that gives this scaling at this rank; whole numbers survive the way there and back."""
        alpha = self.scaling * _divisor(self.rank, rslora)
        whole = round(alpha)
        return whole if math.isclose(alpha, whole, rel_tol=1e-12) else alpha

    def padded(self, rank: int) -> "Factors":
        """The same addition at a larger rank: zero rows in A, zero columns in B."""
        more = rank - self.rank
        A = torch.nn.functional.pad(self.A, (0, 0, 0, more))
        return replace(self, A=A, B=torch.nn.functional.pad(self.B, (0, more)))

    def rescaled(self, scaling: float) -> "Factors":
        """The same addition at another scaling, the quotient multiplied into B."""
        quotient = self.scaling / scaling
        if math.isclose(quotient, 1, rel_tol=1e-12):
            return replace(self, scaling=scaling)
        return replace(self, B=_times(self.B, quotient), scaling=scaling)


def scaling_of(alpha: float, rank: int, rslora: bool) -> float:
    return alpha / _divisor(rank, rslora)


def _divisor(rank: int, rslora: bool) -> float:
    return math.sqrt(rank) if rslora else rank


def _times(tensor: Tensor, factor: float) -> Tensor:
    """In the tensor's dtype if that holds every product exactly (powers of two), else in fp32 at least."""
    exact = tensor.double() * factor
    same_dtype = exact.to(tensor.dtype)
    if torch.equal(same_dtype.double(), exact):
        return same_dtype
    return exact.to(torch.promote_types(tensor.dtype, torch.float32))


def distance(one: Factors, other: Factors) -> float:
    """The largest relative difference of the two additions, over experts: ``norm(one - other) / norm(one)``.

    Neither product is formed: with the factors side by side as one product ``B @ A`` of rank r1 + r2, its squared
    norm is the sum over ``(B^T B) * (A A^T)``. In fp64, with rounding noise near 1e-8.
    """
    A = torch.cat([one.A.double(), other.A.double()], dim=-2)
    B = torch.cat([one.B.double() * one.scaling, other.B.double() * -other.scaling], dim=-1)
    gram = (B.mT @ B) * (A @ A.mT)
    difference = gram.sum((-2, -1)).clamp(min=0).sqrt()
    norm = gram[..., : one.rank, : one.rank].sum((-2, -1)).clamp(min=0).sqrt()
    # Without an addition to compare with, any difference at all is infinitely large.
    relative = torch.where(difference == 0, 0.0, difference / norm)
    return relative.max().item()
