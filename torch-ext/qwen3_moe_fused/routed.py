"""What backward needs of routing, in one int32 tensor: the host pays for each that is allocated, kept and freed.

    order (S,) | m_sizes (E,) | offsets (E+1,) | tiles (S // block_m + E + 1, 3)

as ``routing`` defines them. Each begins at a multiple of 16 bytes, by which Triton loads more at a time. The first two
may be all that there is: they do not depend on the tiles' height, and backward's may be another than forward's.
"""

from typing import Tuple

import torch

Tensor = torch.Tensor


def new_routed(top_k_index: Tensor, num_experts: int, block_m: int) -> Tensor:
    """Memory for all four."""
    return top_k_index.new_empty(_ends(top_k_index.numel(), num_experts, block_m)[-1], dtype=torch.int32)


def new_sorted(top_k_index: Tensor, num_experts: int) -> Tensor:
    """Memory for order and m_sizes."""
    return top_k_index.new_empty(_ends(top_k_index.numel(), num_experts, 16)[1], dtype=torch.int32)


def sorted_part(routed: Tensor, slots: int, num_experts: int) -> Tensor:
    """Order and m_sizes alone."""
    return routed[: _ends(slots, num_experts, 16)[1]]


def order_of(routed: Tensor, slots: int, num_experts: int) -> Tuple[Tensor, Tensor]:
    """order (S,) and m_sizes (E,)."""
    start = _ends(slots, num_experts, 16)[0]
    return routed[:slots], routed[start : start + num_experts]


def tiles_of(routed: Tensor, slots: int, num_experts: int, block_m: int) -> Tuple[Tensor, ...]:
    """offsets (E+1,) and tiles, or nothing if ``routed`` holds none or those of another height. Heights are powers of
    two, so of another there are more or fewer, or each has all rows of an expert either way."""
    _, first, second, end = _ends(slots, num_experts, block_m)
    if routed.shape[0] != end:
        return ()
    return routed[first : first + num_experts + 1], routed[second:end].view(-1, 3)


def _ends(slots: int, num_experts: int, block_m: int) -> Tuple[int, ...]:
    ends, end = [], 0
    for size in (slots, num_experts, num_experts + 1):
        end += -(-size // 4) * 4
        ends.append(end)
    return *ends, end + 3 * (slots // block_m + num_experts + 1)
