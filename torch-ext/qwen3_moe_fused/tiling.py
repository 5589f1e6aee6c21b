"""Tile choice: how large a piece of a grouped product one program computes.

The choice follows from rows per expert (rounded up to a power of two), dtype and card. ``configs/`` holds tuned
tables, one JSON a card, made by ``tune.py``; a card without one takes the table of its kind below. What a card's
shared memory cannot hold is cut down before a launch, never tried.
"""

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import torch


@dataclass(frozen=True)
class Tile:
    """One kernel's tile: BLOCK_N output columns, BLOCK_K of the summed dimension per step."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def fit(self, n: int, k: int) -> "Tile":
        """No wider than a thin matrix of n columns and depth k needs; a dot takes at least 16."""
        if self.block_n <= n and self.block_k <= k:
            return self
        return _narrowed(self, n, k)


@functools.cache
def _narrowed(tile: Tile, n: int, k: int) -> Tile:
    """Kept, as adapters, which always are thin, would pay 2 us for it six times in a step."""
    return replace(tile, block_n=min(tile.block_n, _padded(n)), block_k=min(tile.block_k, _padded(k)))


@dataclass(frozen=True)
class Tiling:
    """The tiles of all kernels of one layer.

    block_m: rows per tile of the grouped kernels, shared so that they read one tile table.
    gate_up: block_n gate columns and as many up columns.
    linear, down_backward: as named.
    weight_grad: a (block_n, block_k) block of the gradient; weight_grad_block_m rows are summed a step.
    """

    block_m: int
    gate_up: Tile
    linear: Tile
    down_backward: Tile
    weight_grad_block_m: int
    weight_grad: Tile


def _tiling(block_m, gate_up, linear, down_backward, weight_grad_block_m, weight_grad) -> Tiling:
    tiles = (Tile(*numbers) for numbers in (gate_up, linear, down_backward, weight_grad))
    gate_up, linear, down_backward, weight_grad = tiles
    return Tiling(block_m, gate_up, linear, down_backward, weight_grad_block_m, weight_grad)


# Few rows: reading weights is all the time, so tiles are low and deep. Many rows: tiles as large as registers allow.
# Keys are rows per expert; the last entry not above the asked number counts.
_LARGE_SHARED_MEMORY = {  # 227 KB: sm_90, sm_100
    1: _tiling(16, (64, 128, 4, 3), (128, 128, 4, 3), (64, 128, 4, 3), 16, (128, 128, 8, 3)),
    32: _tiling(64, (64, 64, 4, 4), (128, 64, 4, 4), (128, 64, 4, 4), 32, (128, 128, 8, 3)),
    128: _tiling(128, (128, 64, 8, 3), (256, 64, 8, 3), (128, 64, 8, 3), 64, (128, 256, 8, 3)),
}
_SMALL_SHARED_MEMORY = {  # 99 KB: sm_86, sm_89, sm_120; also the start for sm_80
    1: _tiling(16, (64, 64, 4, 4), (128, 64, 4, 4), (64, 64, 4, 4), 16, (64, 128, 4, 3)),
    32: _tiling(64, (64, 32, 4, 4), (128, 32, 4, 4), (64, 32, 4, 4), 32, (64, 128, 4, 3)),
    128: _tiling(128, (64, 32, 8, 4), (128, 32, 8, 4), (64, 32, 8, 4), 32, (128, 128, 8, 3)),
}
_SMALL, _LARGE = 99 * 1024, 200 * 1024
_FP32 = {  # multiplied in IEEE fp32 by the ordinary units, where large tiles only spill
    1: _tiling(16, (32, 32, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2), 16, (32, 64, 4, 2)),
    32: _tiling(32, (32, 32, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2), 16, (32, 64, 4, 2)),
}


@dataclass(frozen=True)
class Narrow:
    """The tiles of an adapter's own kernels, see ``kernels.lora``. They are thin and wait for memory, so what counts
    is how many bytes are on their way: several programs share a multiprocessor, each a few stages deep.

    low_rank: at most block_n columns of R, block_k of the summed dimension per step; ``rows`` rows per program.
    factor_grads: at most block_n columns of R and block_k of the factor's other dimension; grad_rows are summed a step.
    """

    rows: int
    low_rank: Tile
    grad_rows: int
    factor_grads: Tile


def choose_narrow(
    rows: int, experts: int, columns: int, dropout: bool, dtype: torch.dtype, device: torch.device
) -> Narrow:
    """The tiles for R = ``columns`` and ``rows`` sorted rows of ``experts`` experts.

    Two limits are Triton's: from 64 rows on, a left operand may be overwritten in registers while it is multiplied
    (triton-lang/triton#9433). With dropout, low_rank's is in registers; with routing weights, that of factor_grads,
    whose rows are the columns of R.
    """
    return _choose_narrow(rows <= 16 * experts, columns, dropout, dtype, _card(device)[1])


@functools.cache
def _choose_narrow(few: bool, columns: int, dropout: bool, dtype: torch.dtype, shared_memory: int) -> Narrow:
    if dtype == torch.float32:
        low_rank, factor_grads = Tile(32, 32, 4, 2), Tile(32, 64, 4, 2)
    else:
        low_rank, factor_grads = Tile(64, 128, 4, 4), Tile(32, 128, 4, 3)
    low_rank = replace(low_rank, block_n=min(low_rank.block_n, _padded(columns)))
    rows = 32 if dropout else 64
    stage = low_rank.block_k * (rows * dtype.itemsize + low_rank.block_n * 4)  # 4: factors may be fp32
    low_rank = replace(low_rank, num_stages=min(low_rank.num_stages, _SMALL // stage))
    return Narrow(rows, low_rank, 16 if few else 64 if shared_memory >= _LARGE else 32, factor_grads)


def choose(rows: int, experts: int, dtype: torch.dtype, device: torch.device) -> Tiling:
    """The tiling for ``rows`` sorted rows of ``experts`` experts."""
    bucket = next_power_of_2(max(1, cdiv(rows, max(1, experts))))
    return _choose(bucket, dtype, *_card(device))


@functools.cache
def _choose(bucket: int, dtype: torch.dtype, card: str, shared_memory: int) -> Tiling:
    if dtype == torch.float32:
        table = _FP32
    else:
        table = _tuned_tilings(card) or (_LARGE_SHARED_MEMORY if shared_memory >= _LARGE else _SMALL_SHARED_MEMORY)
    tiling = table[max((rows for rows in table if rows <= bucket), default=min(table))]
    return limit(tiling, dtype.itemsize, shared_memory)


def limit(tiling: Tiling, itemsize: int, shared_memory: int) -> Tiling:
    """The tiling with stages taken away until every kernel's buffers fit in ``shared_memory`` bytes."""

    def cut(tile: Tile, a_step: int, b_step: int) -> Tile:
        while tile.num_stages > 1 and (a_step + b_step) * itemsize * tile.num_stages > shared_memory:
            tile = replace(tile, num_stages=tile.num_stages - 1)
        return tile

    def product(tile: Tile, halves: int = 1) -> Tile:
        return cut(tile, tiling.block_m * tile.block_k, halves * tile.block_n * tile.block_k)

    grad, rows = tiling.weight_grad, tiling.weight_grad_block_m
    return replace(
        tiling,
        gate_up=product(tiling.gate_up, halves=2),
        linear=product(tiling.linear),
        down_backward=product(tiling.down_backward),
        weight_grad=cut(grad, rows * grad.block_n, rows * grad.block_k),
    )


def card_file(card: str) -> Path:
    """Where a card's tuned table lives, whether or not it exists."""
    return Path(__file__).parent / "configs" / f"{card.replace(' ', '_')}.json"


def _tuned_tilings(card: str) -> Dict[int, Tiling]:
    return {int(rows): _tiling(**entry) for rows, entry in _tuned(card).get("tilings", {}).items()}


def tuned_fast_rows(device: torch.device) -> Optional[Dict[str, int]]:
    """What ``tune.py`` has found for this card in the place of ``regime.FAST_ROWS``, for "forward" and "backward"; None
    if it was not asked."""
    return _tuned(_card(device)[0]).get("fast_rows")


@functools.cache
def _tuned(card: str) -> Dict[str, Any]:
    path = card_file(card)
    return json.loads(path.read_text()) if path.is_file() else {}


@functools.cache
def _card(device: torch.device) -> Tuple[str, int]:
    """Name and bytes of shared memory a program may use; a CPU (Triton's interpreter) counts as a small card."""
    if device.type != "cuda":
        return "cpu", _SMALL
    properties = torch.cuda.get_device_properties(device)
    return properties.name, properties.shared_memory_per_block_optin


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _padded(size: int) -> int:
    return max(16, next_power_of_2(size))
