"""Routing: which rows belong to which expert, worked out on the device.

A slot is one (token, choice) pair; slot ``t * k + j`` is token t's j-th expert. Sorting the slots by expert gives
every expert a run of consecutive rows, and a tile cuts such a run into pieces of at most ``block_m`` rows: the unit
of work of every grouped kernel. All shapes follow from (T, k, E) alone, so the host never waits for the router.

| name      | shape                      | meaning                                                        |
|-----------|----------------------------|----------------------------------------------------------------|
| order     | (S,)                       | the slot at each sorted row; slots of an expert keep their order |
| m_sizes   | (E,)                       | rows per expert                                                |
| offsets   | (E+1,)                     | first row of each expert; ``offsets[E]`` rows in all            |
| tiles     | (S // block_m + E + 1, 3)  | (expert, first row, end of the expert's rows); unused: expert -1 |
"""

from typing import NamedTuple, Tuple

import torch

from . import reference
from ._ops import add_op_namespace_prefix
from .checks import check_count, check_device, check_dims, check_integer


class Routing(NamedTuple):
    """int32 tensors on the device of ``top_k_index``; see the module's table."""

    order: torch.Tensor
    m_sizes: torch.Tensor
    offsets: torch.Tensor
    tiles: torch.Tensor


def routing(top_k_index: torch.Tensor, num_experts: int, block_m: int = 128) -> Routing:
    """Sorts the slots by expert and cuts each expert's rows into tiles.

    Args:
        top_k_index: (T, k) int32 or int64, values in [0, E]. E marks a slot to skip (under expert parallelism, an
            expert of another rank): such slots stand behind the last expert in ``order`` and belong to no tile.
        num_experts: E.
        block_m: rows per tile, a power of two of at least 16.

    Returns:
        :class:`Routing`.

    Raises:
        TypeError, ValueError: an argument of the wrong type or shape; on a CPU also a value outside [0, E]. On a GPU
            a value outside counts as E, since looking at it would make the host wait.
    """
    check_dims("top_k_index", top_k_index, "(T, k)")
    check_integer("top_k_index", top_k_index)
    check_device("top_k_index", top_k_index)
    check_count("num_experts", num_experts, 1)
    check_count("block_m", block_m, 16)
    if block_m & (block_m - 1):
        raise ValueError(f"block_m must be a power of two, got {block_m}")
    return Routing(*_routing(top_k_index, num_experts, block_m))


@torch.library.custom_op(add_op_namespace_prefix("routing"), mutates_args=(), device_types="cuda")
def _routing(
    top_k_index: torch.Tensor, num_experts: int, block_m: int
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    from .kernels.routing import routing as launch  # Triton is imported only where it can run

    with torch.cuda.device(top_k_index.device):
        return launch(top_k_index, num_experts, block_m)


_routing.register_kernel("cpu")(reference.routing)


@_routing.register_fake
def _(top_k_index, num_experts, block_m):
    slots = top_k_index.numel()
    shapes = (slots,), (num_experts,), (num_experts + 1,), (slots // block_m + num_experts + 1, 3)
    return tuple(top_k_index.new_empty(shape, dtype=torch.int32) for shape in shapes)
