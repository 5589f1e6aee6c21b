"""The problems the tests pose: sizes, an imbalance between the experts, and how tensors lie in memory.

A problem's repr is its test id. Every draw is fresh and prints the problem with its seed, so that a failing test
shows the line that draws the same tensors again.
"""

import secrets
from dataclasses import dataclass, fields, replace
from typing import NamedTuple, Optional

import torch

from .oracle import FEW_RATIO, RATIO
from .poison import POISON

Tensor = torch.Tensor

BALANCES = ("random", "one_takes_all", "one_row_each", "some_empty")
SKIPPING = ("some_skipped", "all_skipped")
NOTHING = ({"k": 0}, {"E": 0}, {"H": 0}, {"I": 0})
LAYOUTS = ("contiguous", "transposed", "padded", "aligned", "expanded")

FEW = 64
"""With fewer elements than this all sums of a tensor may happen to cancel, and no rounding error is small beside what
is left of them. Such problems are drawn positive and away from zero, and nothing cancels or underflows."""


class Drawn:
    """What the problems share: a repr without defaults, draws that tell their seed, and how exact results must be."""

    def __repr__(self) -> str:
        changed = (f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default)
        return f"{type(self).__name__}({', '.join(changed)})"

    def generator(self, device: str) -> torch.Generator:
        seed = self.seed
        if seed is None:
            seed = secrets.randbelow(2**31)
            print(f"drawn on {device}: {replace(self, seed=seed)}")
        return torch.Generator(device).manual_seed(seed)

    def normal(self, generator: torch.Generator, dtype: torch.dtype, *shape: int, fan_in: int = 1) -> Tensor:
        """Normal numbers, scaled so that a sum over ``fan_in`` of them times normal ones is about 1."""
        numbers = torch.randn(shape, generator=generator, device=generator.device)
        if self.few():
            numbers.abs_().add_(0.5).div_(max(fan_in, 1))
        else:
            numbers.div_(max(fan_in, 1) ** 0.5)
        return numbers.to(dtype)

    def few(self) -> bool:
        """Whether some result has so few elements that sums must not cancel, and roundings need not average out."""
        return self.positive or self.elements() < FEW

    def ratio(self, dtype: torch.dtype) -> float:
        """How far results in ``dtype`` may be from fp64, as a ratio of norms."""
        return RATIO[dtype] * (FEW_RATIO if self.few() else 1)


class ExpertsInputs(NamedTuple):
    """The tensors of ``fused_experts``, in its order, and a gradient for its result."""

    hidden_states: Tensor
    top_k_index: Tensor
    top_k_weights: Tensor
    gate_up_proj: Tensor
    down_proj: Tensor
    grad_output: Tensor


@dataclass(frozen=True, repr=False)
class Problem(Drawn):
    """An experts layer: T tokens, k experts per token, E experts, H hidden, I intermediate."""

    T: int = 32
    k: int = 2
    E: int = 4
    H: int = 24
    I: int = 16
    imbalance: str = "random"
    activation: str = "silu"
    positive: bool = False
    seed: Optional[int] = None

    def elements(self) -> int:
        """Of the smallest result. A token that goes to one expert k times has the same gradient k times; and where sums
        are over less than eight numbers, few elements are so large that they alone count."""
        choices = 1 if self.imbalance == "one_takes_all" else self.k
        return min(self.T * choices, 8 * self.H, 8 * self.I)

    def experts_with_rows(self) -> int:
        """About how many; no more than that of an expert's gradients are not zero."""
        share = {"one_takes_all": 1, "some_empty": (self.E + 1) // 2}
        return min(share.get(self.imbalance, self.E), self.T * self.k)

    def draw_index(self, device: str) -> Tensor:
        """top_k_index alone."""
        return choose_experts(self.imbalance, self.T, self.k, self.E, self.generator(device))

    def draw(self, device: str, dtype: torch.dtype, weights_dtype: Optional[torch.dtype] = None) -> ExpertsInputs:
        """``weights_dtype`` is that of top_k_weights, by default ``dtype``."""
        g = self.generator(device)
        weights = torch.rand(self.T, self.k, generator=g, device=g.device).add_(0.1)
        return ExpertsInputs(
            self.normal(g, dtype, self.T, self.H),
            choose_experts(self.imbalance, self.T, self.k, self.E, g),
            weights.to(weights_dtype or dtype),
            self.normal(g, dtype, self.E, 2 * self.I, self.H, fan_in=self.H),
            self.normal(g, dtype, self.E, self.H, self.I, fan_in=self.I),
            self.normal(g, dtype, self.T, self.H, fan_in=self.H),
        )


class LinearInputs(NamedTuple):
    """The tensors of ``moe_fused_linear``, in its order, and a gradient for its result."""

    input: Tensor
    weight: Tensor
    m_sizes: Tensor
    grad_output: Tensor


@dataclass(frozen=True, repr=False)
class LinearProblem(Drawn):
    """A grouped linear layer: M rows, E matrices of (N, K)."""

    M: int = 29
    N: int = 24
    K: int = 16
    E: int = 4
    imbalance: str = "random"
    positive: bool = False
    seed: Optional[int] = None

    def elements(self) -> int:
        return min(self.M * self.N, self.M * self.K, self.N * self.K)

    def draw(self, device: str, dtype: torch.dtype) -> LinearInputs:
        g = self.generator(device)
        experts = choose_experts(self.imbalance, self.M, 1, self.E, g).flatten()
        return LinearInputs(
            self.normal(g, dtype, self.M, self.K),
            self.normal(g, dtype, self.E, self.N, self.K, fan_in=self.K),
            torch.bincount(experts, minlength=self.E).int(),
            self.normal(g, dtype, self.M, self.N),
        )


def choose_experts(imbalance: str, rows: int, k: int, experts: int, generator: torch.Generator) -> Tensor:
    """(rows, k) int64: the experts each row goes to."""
    device = generator.device
    if imbalance == "one_takes_all":
        return torch.full((rows, k), experts - 1, device=device)
    if imbalance == "one_row_each":  # as even as can be: exactly one row each when rows * k == experts
        return (torch.arange(rows * k, device=device) % experts).flip(0).view(rows, k)
    if imbalance == "some_empty":
        return torch.randint((experts + 1) // 2, (rows, k), generator=generator, device=device) * 2
    if imbalance == "all_skipped":
        return torch.full((rows, k), experts, device=device)
    distinct = torch.rand(rows, experts, generator=generator, device=device).topk(k, dim=1).indices
    if imbalance == "some_skipped":
        skipped = torch.rand(rows, k, generator=generator, device=device) < 0.4
        skipped[:1] = True  # one token is skipped altogether
        return distinct.masked_fill(skipped, experts)
    return distinct


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values (for "expanded", the first row's or matrix's) with other strides.

    "transposed" crosses the last two dimensions; a vector becomes a column of a matrix.
    "padded" cuts the tensor out of a larger one that is NaN everywhere else: whoever reads outside gets a NaN.
    "aligned" does so too, with rows that still start at addresses that suit wide loads.
    """
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.transpose(-2, -1).contiguous().transpose(-2, -1)
    fill = float("nan") if tensor.is_floating_point() else POISON
    if layout == "transposed" and tensor.dim() == 1:
        return torch.stack((tensor, torch.full_like(tensor, fill)), 1)[:, 0]
    if layout in ("padded", "aligned"):
        margin = 1 if layout == "padded" else 16
        inside = tuple(slice(margin, size + margin) for size in tensor.shape)
        shape = [size + 2 * margin for size in tensor.shape]
        around = torch.full(shape, fill, dtype=tensor.dtype, device=tensor.device)
        around[inside] = tensor
        return around[inside]
    if layout == "expanded" and tensor.shape[0]:
        return tensor[:1].expand_as(tensor)
    return tensor
