"""Whether a written adapter adds to every weight what the one it was made from adds."""

from typing import Optional

import torch

from .adapter import Adapter
from .factors import Factors, distance

TOLERANCE = 1e-6
"""Of the relative difference: room for a scaling that was multiplied into B in fp32, and for nothing else."""


def assert_same(source: Adapter, written: Adapter) -> None:
    """Raises ValueError, naming the worst weight, unless ``scaling * B @ A`` agrees for every expert and layer."""
    one, other = _additions(source), _additions(written)
    distances = {name: _distance(one.get(name), other.get(name)) for name in one.keys() | other.keys()}
    worst = max(distances, key=distances.get)
    if not distances[worst] <= TOLERANCE:
        raise ValueError(
            f"{worst}: the written adapter adds something else, relative difference {distances[worst]:.1e}"
        )
    if source.rest.keys() != written.rest.keys():
        raise ValueError(
            f"the written adapter has other tensors: {sorted(source.rest.keys() ^ written.rest.keys())[:4]}"
        )
    for key, tensor in source.rest.items():
        if not torch.equal(tensor, written.rest[key]):
            raise ValueError(f"{key} is not what it was")


def _additions(adapter: Adapter) -> dict[str, Factors]:
    experts = {
        f"{block}.{projection}": factors
        for block, projections in adapter.experts.items()
        for projection, factors in projections.items()
    }
    return {**experts, **adapter.linears}


def _distance(one: Optional[Factors], other: Optional[Factors]) -> float:
    if one is None or other is None:  # a projection without an adapter and one that adds nothing are the same
        return float("inf") if (one or other).B.any() else 0.0
    same_sizes = one.A.shape[-1] == other.A.shape[-1] and one.B.shape[:-1] == other.B.shape[:-1]
    return distance(one, other) if same_sizes else float("inf")
