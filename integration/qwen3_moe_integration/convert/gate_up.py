"""Gate and up as one projection, and apart again.

Transformers v5 holds them as one weight ``gate_up_proj (E, 2I, H)``, gate rows first, so PEFT has one pair of factors
for both. Two pairs become one in one of two ways:

    A is the same:   A = A_gate = A_up,    B = [B_gate; B_up]               rank r
    A differs:       A = [A_gate; A_up],   B = [[B_gate, 0], [0, B_up]]     rank r_gate + r_up, block-diagonal

The way back follows from B where it has no columns of zeros. Where it has, as before training, only a record can tell.
"""

import math
from typing import Optional

import torch

from .factors import Factors

SHARED = "shared"


def join(gate: Optional[Factors], up: Optional[Factors]) -> Factors:
    """One pair of factors for gate and up; one of the two may be absent.

    Factors stay bit-equal unless the two scalings differ: then up takes gate's, and B of up the quotient.
    """
    if gate is None or up is None:
        only = up if gate is None else gate
        zeros = torch.zeros_like(only.B)
        return Factors(only.A, torch.cat([zeros, only.B] if gate is None else [only.B, zeros], dim=1), only.scaling)
    if _share_A(gate, up):
        return Factors(gate.A, torch.cat([gate.B, up.B], dim=1), gate.scaling)
    up = up.rescaled(gate.scaling)
    (E, I, r_gate), r_up = gate.B.shape, up.rank
    dtype = torch.promote_types(gate.B.dtype, up.B.dtype)
    B = torch.zeros(E, 2 * I, r_gate + r_up, dtype=dtype)
    B[:, :I, :r_gate], B[:, I:, r_gate:] = gate.B, up.B
    return Factors(torch.cat([gate.A, up.A], dim=1), B, gate.scaling)


def record(gate: Optional[Factors], up: Optional[Factors]) -> str:
    """How many of the joint B's first columns are gate's alone, or that both share all of them."""
    if gate is not None and up is not None and _share_A(gate, up):
        return SHARED
    return str(gate.rank if gate is not None else 0)


def split(both: Factors, recorded: Optional[str] = None) -> tuple[Optional[Factors], Optional[Factors]]:
    """(gate, up), exactly; a projection that has no columns of its own in a block-diagonal B is absent.

    Args:
        recorded: what :func:`record` gave, followed where B allows it.
    """
    I = both.B.shape[1] // 2
    first = None if recorded == SHARED else _columns_of_gate(both.B, I, recorded)
    if first is None:
        return tuple(Factors(both.A, B, both.scaling) for B in (both.B[:, :I], both.B[:, I:]))
    gate = Factors(both.A[:, :first], both.B[:, :I, :first], both.scaling)
    up = Factors(both.A[:, first:], both.B[:, I:, first:], both.scaling)
    return tuple(factors if factors.rank else None for factors in (gate, up))


def _share_A(gate: Factors, up: Factors) -> bool:
    return torch.equal(gate.A, up.A) and math.isclose(gate.scaling, up.scaling, rel_tol=1e-12)


def _columns_of_gate(B: torch.Tensor, I: int, recorded: Optional[str]) -> Optional[int]:
    """How many of B's first columns are gate's, None if B is not block-diagonal.

    Columns that are all zero may be of either. Without a record the halves are then equal if they can be, as they are
    by default.
    """
    rank = B.shape[-1]
    in_gate, in_up = ((half != 0).any(dim=0).any(dim=0).nonzero().flatten().tolist() for half in (B[:, :I], B[:, I:]))
    least = max(in_gate, default=-1) + 1
    most = min(in_up, default=rank)
    wanted = int(recorded) if (recorded or "").isdecimal() else rank // 2
    return min(max(wanted, least), most) if least <= most else None
