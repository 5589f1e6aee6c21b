"""How 4-bit experts are multiplied: by which path, and in which tiles.

    plain        decoded tile by tile in mature Triton; any card, any of the formats
    fast         decoded where NVIDIA's tensor cores read it, see ``kernels.four_bit_fast``
    dequantize   the experts that have rows are decoded once into scratch memory, then multiplied as dense ones

and a fourth, ``kernels.gemv``, for the few slots of a step of generation. All read an expert's weights at least once,
so with few rows the first two win by the memory they do not touch, and with many the third, which decodes each weight
once instead of once per tile of rows.
"""

import functools
from dataclasses import replace
from typing import NamedTuple, Tuple

import torch

from .projection import FourBitWeight, Projection, Weight
from .tiling import Tile, Tiling, cdiv, tuned_fast_rows

FAST_ROWS = 800
"""Rows per expert up to which the fast path beats dequantizing. Forward and backward on an H100, ms: at 768 rows 2.51
and 2.95 against 2.70 and 3.17, at 1024 3.12 and 3.91 against 3.29 and 4.00. Since then dequantizing takes 4 to 6 %
less, and the fast path as much, in backward more, by an H200's times; 800 was not measured. A tuned table has a card's
own numbers, chosen with a margin for uneven routing: an H200's are 512 forward and 640 backward."""

PLAIN_ROWS = 40
"""The same for the plain path where dequantizing has no byte permutes either: 1.69 against 2.05 ms at 32 rows, 2.65
against 2.10 at 64. With them, dequantizing takes a third of that time, and plain lost from one row per expert on."""

PERMUTE_ROWS = 6
"""Rows per expert from which a permuted copy of the tokens (4 us) costs less than permuting them as they are loaded."""

GEMV_SLOTS = 24
"""Slots up to which each is multiplied on its own. In a CUDA graph on an H100, ms for 8, 16 and 32 slots: 0.028, 0.047
and 0.083 against 0.063, 0.068 and 0.078."""

SCRATCH = 64 * 2**20
LARGE_SCRATCH = 511 * 2**20
LARGE_SCRATCH_ROWS = 256
"""Bytes that the weights decoded at a time may take: each run of them ends on a half-empty GPU. Up to so many rows an
expert the larger takes at least 13 % off the layer's time, at 384 7 to 9 %, at 512 3 to 4; at 768 forward and backward
take 18 % longer. On an H200: benchmarks/results/nvidia-h200/scratch.txt."""

WINDOW = 64 * 2**20
"""Bytes that the second product's result, a row a slot, may take whole. Above, it comes in two halves, which frees half
of the largest tensor of a layer for 0 to 3 % of its time at 4096 tokens. Four windows cost 3 to 12 %, for half as much
again. On an H200: benchmarks/results/nvidia-h200/windows.txt."""


class Plan(NamedTuple):
    """One direction of the layer: the path its weights take, rows per tile, and the tiles of its two products.

    Forward, first is gate_up and second is down; backward, first is down_backward and second the gradient of
    hidden_states. ``permute`` has the columns of what they read permuted beforehand, see ``four_bit_fast``; ``scratch``
    is the most bytes decoded at a time.
    """

    path: str
    block_m: int
    first: Tile
    second: Tile
    permute: bool
    scratch: int


def plan(
    slots: int, gate_up_proj: Weight, down_proj: Weight, dtype: torch.dtype, device: torch.device, dense: Tiling,
    backward: bool,
) -> Plan:  # fmt: skip
    """The plan for ``slots`` rows of all experts together; ``dense`` is the tiling for dense weights."""
    rows = cdiv(slots, max(1, gate_up_proj.shape[0]))
    path = regime(rows, (gate_up_proj, down_proj), dtype, device, backward)
    if path in ("dense", "dequantize"):
        first = dense.down_backward if backward else dense.gate_up
        scratch = LARGE_SCRATCH if rows <= LARGE_SCRATCH_ROWS else SCRATCH
        return Plan(path, dense.block_m, first, dense.linear, False, scratch)
    block_m, first, second = _tiles(path, rows, down_proj.shape[2], gate_up_proj.shape[2], backward)
    both = isinstance(gate_up_proj, FourBitWeight) and isinstance(down_proj, FourBitWeight)
    permute = path == "fast" and both and not backward and rows >= PERMUTE_ROWS
    return Plan(path, block_m, first, second, permute, 0)


def window(slots: int, columns: int, tile: Tile, dtype: torch.dtype, path: str) -> int:
    """How many of the second product's columns are computed, one row a slot, before those of each token are added up:
    all, or half of them, in whole blocks of the tile.

    All where weights are dequantized: each half would decode them anew, and the memory serves gate_up or down_backward
    as scratch before.
    """
    if path == "dequantize" or slots * columns * dtype.itemsize <= WINDOW:
        return columns
    return min(columns, cdiv(columns, 2 * tile.block_n) * tile.block_n)


@functools.lru_cache(maxsize=1024)  # of rows there may be as many as there are lengths of batches
def _tiles(path: str, rows: int, intermediate: int, hidden: int, backward: bool) -> Tuple[int, Tile, Tile]:
    """Rows per tile, first and second. Kept, for the host takes 5 us to find them."""
    table = _PLAIN if path == "plain" else _FAST_BACKWARD if backward else _FAST
    block_m, first, second = table[max((least for least in table if least <= rows), default=min(table))]
    if backward:
        first, second = _whole(first, intermediate), _whole(second, hidden)
    return block_m, first, second


def regime(
    rows: int, weights: Tuple[Weight, ...], dtype: torch.dtype, device: torch.device, backward: bool = False
) -> str:
    """``dense`` if no weight is in 4 bit, else the fastest path that can take those that are.

    Args:
        rows: rows per expert, on average: what a launch can know without waiting for the device.
        weights: the projections' weights, (E, N, K) each.
        dtype, device: of the tokens.
        backward: whether gradients are computed, or the layer itself.
    """
    packed = [weight for weight in weights if isinstance(weight, FourBitWeight)]
    if not packed:
        return "dense"
    if has_byte_permute(device):
        few = rows <= fast_rows(device, backward)
        fast = few and dtype != torch.float32 and all([_fits_fast(weight) for weight in packed])
        return "fast" if fast else "dequantize"
    return "plain" if rows <= PLAIN_ROWS and all([_fits_plain(weight) for weight in packed]) else "dequantize"


@functools.cache
def fast_rows(device: torch.device, backward: bool) -> int:
    """Rows per expert up to which this card takes the fast path in one direction; 0 if it never does."""
    tuned = tuned_fast_rows(device)
    return FAST_ROWS if tuned is None else tuned["backward" if backward else "forward"]


def suits_gemv(slots: int, gate_up: Projection, down: Projection, device: torch.device) -> bool:
    """Whether the slots are so few that ``kernels.gemv`` takes them one by one; it knows no adapters."""
    return (
        0 < slots <= GEMV_SLOTS
        and has_byte_permute(device)
        and all(p.four_bit and p.lora is None and _fits_fast(p.weight) for p in (gate_up, down))
    )


def _whole(tile: Tile, n: int) -> Tile:
    """The tile narrowed until n columns are whole ones: transposed, a 4-bit matrix has no ragged ones."""
    while n % tile.block_n:
        tile = replace(tile, block_n=tile.block_n // 2)
    return tile


def _fits_plain(weight: FourBitWeight) -> bool:
    """No block straddles two rows, and a tile's 64 columns are in one block or in whole ones."""
    _, n, k = weight.shape
    size = weight.blocksize
    return n % 64 == 0 and k % 64 == 0 and k % size == 0 and size & (size - 1) == 0 and size >= 16


def _fits_fast(weight: FourBitWeight) -> bool:
    """The same for blocks of 64 or more, and whole tiles in both directions; words are read, four at a time."""
    _, n, k = weight.shape
    whole = n % 128 == 0 and k % 128 == 0 and weight.blocksize >= 64
    return whole and _fits_plain(weight) and weight.packed.data_ptr() % 16 == 0


@functools.cache
def has_byte_permute(device: torch.device) -> bool:
    """An NVIDIA card from sm_80 on: one with PRMT, and with bf16 arithmetic beside it."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


# (rows per tile, first, second) by rows per expert; see ``Tile``. Low tiles wait for weights, so they are deep; higher
# ones decode as little as registers allow. Shared memory stays below the 99 KB of consumer cards. At 4 and 5 rows
# backward has forward's 16 rows a tile: in 32 it took 2 % longer on an H200, at 4. Tiles of 256 rows, which decode half
# as often, lose 5 to 50 % where rows are many: nvidia-h200/tiles.txt.
def _entry(block_m: int, first: Tuple, second: Tuple) -> Tuple[int, Tile, Tile]:
    return block_m, Tile(*first), Tile(*second)


_FAST = {
    1: _entry(16, (64, 128, 4, 4), (128, 128, 4, 4)),
    6: _entry(32, (64, 128, 4, 3), (128, 128, 4, 3)),
    12: _entry(64, (64, 64, 4, 4), (128, 64, 4, 4)),
    96: _entry(128, (64, 64, 4, 4), (128, 64, 4, 4)),
    384: _entry(128, (64, 64, 4, 3), (128, 64, 4, 3)),
}
_FAST_BACKWARD = {
    1: _entry(16, (256, 64, 4, 4), (256, 64, 4, 4)),
    4: _entry(16, (128, 64, 4, 4), (128, 64, 4, 4)),
    6: _entry(32, (256, 64, 4, 3), (256, 64, 4, 3)),
    12: _entry(64, (256, 64, 4, 3), (256, 64, 4, 3)),
    96: _entry(128, (128, 64, 4, 3), (128, 64, 4, 4)),
}
_PLAIN = {
    1: _entry(16, (32, 64, 4, 3), (64, 64, 4, 3)),
    16: _entry(32, (32, 64, 4, 3), (64, 64, 4, 3)),
}
