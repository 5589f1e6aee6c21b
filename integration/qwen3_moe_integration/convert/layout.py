"""What a layout of expert LoRA is: names and shapes on disk for the factors of every projection."""

import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch

from .factors import Factors
from .lora_config import Target, rank_of, scaling_at

Tensor = torch.Tensor

Projections = dict[str, Factors]
"""gate_proj, up_proj and down_proj, or those of them that are adapted; A (E, r, in), B (E, out, r)."""

Experts = dict[str, Projections]
"""The projections of every block: of the module that has the experts, by its name in the adapter's keys."""


class Layout(ABC):
    """One way to write the expert LoRA of an adapter."""

    @abstractmethod
    def owns(self, key: str, tensor: Tensor) -> bool:
        """Whether the tensor is of an expert, in this layout."""

    @abstractmethod
    def read(self, tensors: dict[str, Tensor], config: dict[str, Any], metadata: dict[str, str]) -> Experts:
        """The factors in ``tensors``, which has none but owned ones and those of linear layers.

        ``metadata`` is that of the file. What :meth:`metadata` gave may be there or not.

        Raises:
            ValueError: experts are missing, shapes disagree with each other or with ``config``.
        """

    def metadata(self, experts: Experts) -> dict[str, str]:
        """What tensors of this layout cannot say of ``experts``, which are not arranged yet."""
        return {}

    def arrange(self, projections: Projections) -> Projections:
        """The projections as this layout groups them."""
        return projections

    @abstractmethod
    def write(self, experts: Experts) -> dict[str, Tensor]:
        """The tensors of arranged projections."""

    @abstractmethod
    def targets(self, block: str, projection: str, factors: Factors) -> Iterator[Target]:
        """What the configuration names for one arranged projection."""

    def linear_target(self, module: str, factors: Factors) -> Target:
        """What the configuration names for a linear layer beside the experts."""
        return Target(base_name(module), factors)


def base_name(module: str) -> str:
    """A module's name in the base model, which is the one that the configuration's patterns match."""
    return module.removeprefix("base_model.model.")


def pair_up(stacks: dict[tuple[str, str, str], Tensor]) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    """(block, projection, A, B) from tensors by (block, projection, "A" or "B")."""
    pairs = defaultdict(dict)
    for (block, projection, side), stack in stacks.items():
        pairs[block, projection][side] = stack
    for (block, projection), sides in pairs.items():
        for side in "AB":
            if side not in sides:
                raise ValueError(f"{block}: {projection} has a lora_{'AB'.replace(side, '')} but no lora_{side}")
        yield block, projection, sides["A"], sides["B"]


def factors_of(target: str, A: Tensor, B: Tensor, config: dict[str, Any]) -> Factors:
    """The factors of ``target``, a name in the base model, with the scaling that the configuration gives them."""
    if A.shape[:-2] != B.shape[:-2] or A.shape[-2] != B.shape[-1]:
        raise ValueError(
            f"{target}: lora_A must be (..., r, in) and lora_B (..., out, r), got {tuple(A.shape)} and {tuple(B.shape)}"
        )
    rank = rank_of(config, target)
    if A.shape[-2] != rank:
        raise ValueError(f"{target}: adapter_config.json gives it rank {rank}, but lora_A is {tuple(A.shape)}")
    return Factors(A, B, scaling_at(config, target, rank))


def check_sizes(experts: Experts) -> None:
    """Raises ValueError unless all projections of all blocks are of one model: E, H and I agree."""
    seen = {}
    for block, projections in experts.items():
        for projection, factors in projections.items():
            (E, _, width), height = factors.A.shape, factors.B.shape[1]
            H, I = (height, width) if projection == "down_proj" else (width, height)
            for name, size in (("experts", E), ("hidden size", H), ("intermediate size", I)):
                first, expected = seen.setdefault(name, (f"{block}.{projection}", size))
                if size != expected:
                    raise ValueError(f"{block}.{projection} has {name} {size}, but {first} has {expected}")


def key_pattern(pattern: str) -> re.Pattern:
    return re.compile(rf"(?P<block>.+)\.{pattern}\.lora_(?P<side>[AB])\.weight")
