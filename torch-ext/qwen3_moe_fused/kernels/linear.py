"""Grouped linear: out[row] = w[expert of row] @ a[row], for rows sorted by expert.

Three uses: ``moe_fused_linear`` and its gradient (rows in, rows out), the down projection and the gradient of
hidden_states (rows in, one row per slot out, so that ``combine`` can add a token's slots in a fixed order).
"""

from typing import Optional

import torch
import triton
import triton.language as tl

from ..tiling import Tile, cdiv, choose
from .launch import launch
from .lora import Addition, add_low_rank, addition_operand
from .product import Stored, accumulate, clamp, near, operand
from .routing import tile_table

Tensor = torch.Tensor


@triton.jit
def _linear_tile(
    a, w, w_desc, addition, out, scatter, expert, first_expert, first, end, col,
    stride_am, stride_ak, stride_we, stride_wn, stride_wk, stride_om,
    N: tl.constexpr, K: tl.constexpr, LORA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, W_ROWS: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    row = first + tl.arange(0, BLOCK_M)
    cols = col + tl.arange(0, BLOCK_N)
    valid = tl.minimum(row, end - 1)
    clamped = clamp(cols, N, BLOCK_N)
    acc = accumulate(
        a, w, w_desc, valid, clamped, expert - first_expert, col, N, K,
        stride_am, stride_ak, stride_we, stride_wn, stride_wk, BLOCK_M, BLOCK_N, BLOCK_K, W_ROWS, 1, FORMAT,
    )  # fmt: skip
    if scatter is not None:
        row_out = tl.load(scatter + valid)
    else:
        row_out = row
    acc = add_low_rank(acc, addition, valid, row_out, clamped, expert, N, LORA)
    at = out + row_out.to(tl.int64)[:, None] * stride_om + cols[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=(row < end)[:, None] & (cols < N)[None, :])


@triton.jit
def _linear_rows(
    a, w, w_desc, addition, out, scatter, expert, first_expert, first, end, col,
    stride_am, stride_ak, stride_we, stride_wn, stride_wk, stride_om,
    N: tl.constexpr, K: tl.constexpr, LORA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, W_ROWS: tl.constexpr, FORMAT: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """A tile, or with SPLIT half of one where that will do: an expert's last tile seldom is full."""
    if SPLIT:
        if end - first > BLOCK_M // 2:
            _linear_tile(
                a, w, w_desc, addition, out, scatter, expert, first_expert, first, end, col, stride_am, stride_ak,
                stride_we, stride_wn, stride_wk, stride_om, N, K, LORA, BLOCK_M, BLOCK_N, BLOCK_K, W_ROWS, FORMAT,
            )  # fmt: skip
        else:
            _linear_tile(
                a, w, w_desc, addition, out, scatter, expert, first_expert, first, end, col, stride_am, stride_ak,
                stride_we, stride_wn, stride_wk, stride_om, N, K, LORA, BLOCK_M // 2, BLOCK_N, BLOCK_K, W_ROWS, FORMAT,
            )  # fmt: skip
    else:
        _linear_tile(
            a, w, w_desc, addition, out, scatter, expert, first_expert, first, end, col, stride_am, stride_ak,
            stride_we, stride_wn, stride_wk, stride_om, N, K, LORA, BLOCK_M, BLOCK_N, BLOCK_K, W_ROWS, FORMAT,
        )  # fmt: skip


@triton.jit(do_not_specialize=["first_block", "blocks"])
def _linear_kernel(
    # pointers
    a, w, w_desc, addition, out, scatter, tiles,
    # sizes
    first_block, blocks, N: tl.constexpr, K: tl.constexpr, REST: tl.constexpr,
    # strides
    stride_am, stride_ak, stride_we, stride_wn, stride_wk, stride_om,
    # meta
    LORA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    W_ROWS: tl.constexpr, FORMAT: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Grid (tiles * blocks,): one tile of rows, BLOCK_N columns.

    a (M, K), w (E, N, K). out (M, .) holds a window of the N columns: ``blocks`` blocks, of which the first is
    ``first_block``. scatter (M,) or None: row i goes to out[scatter[i]]. Tiles of "expert" REST get zeros. addition
    and LORA as in lora, scatter then tells the slots.
    """
    tile = tiles + tl.program_id(0) // blocks * 3
    col = (first_block + tl.program_id(0) % blocks) * BLOCK_N
    out -= first_block * BLOCK_N
    expert = tl.load(tile)
    first = tl.load(tile + 1)
    end = tl.load(tile + 2)
    if (expert == REST) & (REST >= 0):
        row = first + tl.arange(0, BLOCK_M)
        cols = col + tl.arange(0, BLOCK_N)
        zeros = tl.zeros((BLOCK_M, BLOCK_N), out.dtype.element_ty)
        at = out + row.to(tl.int64)[:, None] * stride_om + cols[None, :]
        tl.store(at, zeros, mask=(row < end)[:, None] & (cols < N)[None, :])
        return
    if expert < 0:
        return
    _linear_rows(
        a, w, w_desc, addition, out, scatter, expert, 0, first, end, col, stride_am, stride_ak, stride_we, stride_wn,
        stride_wk, stride_om, N, K, LORA, BLOCK_M, BLOCK_N, BLOCK_K, W_ROWS, FORMAT, SPLIT,
    )  # fmt: skip


@triton.jit(do_not_specialize=["first_expert", "last_expert", "first_block", "blocks"])
def _linear_run_kernel(
    # pointers
    a, w, w_desc, addition, out, scatter, tiles, offsets,
    # sizes
    first_expert, last_expert, first_block, blocks, N: tl.constexpr, K: tl.constexpr,
    # strides
    stride_am, stride_ak, stride_we, stride_wn, stride_wk, stride_om,
    # meta
    LORA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    W_ROWS: tl.constexpr, FORMAT: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Grid (programs,), of any number: the tiles of a run of experts, which the programs take in turns.

    Which tiles these are only the device knows, so the grid of ``_linear_kernel``, a program for every tile, would
    have most of them do nothing. w (last_expert - first_expert, N, K); offsets (E+1,), by which the run's entries of
    ``tiles`` are found, see routing. All else as in ``_linear_kernel``.
    """
    out -= first_block * BLOCK_N
    begin = tl.load(offsets + first_expert) // BLOCK_M + first_expert
    stop = tl.load(offsets + last_expert) // BLOCK_M + last_expert
    for at in range(begin * blocks + tl.program_id(0), stop * blocks, tl.num_programs(0)):
        tile = tiles + at // blocks * 3
        col = (first_block + at % blocks) * BLOCK_N
        expert = tl.load(tile)
        first = tl.load(tile + 1)
        end = tl.load(tile + 2)
        if expert >= 0:
            _linear_rows(
                a, w, w_desc, addition, out, scatter, expert, first_expert, first, end, col, stride_am, stride_ak,
                stride_we, stride_wn, stride_wk, stride_om, N, K, LORA, BLOCK_M, BLOCK_N, BLOCK_K, W_ROWS, FORMAT,
                SPLIT,
            )  # fmt: skip


def linear_tiles(
    a: Tensor,
    weight: Stored,
    offsets: Tensor,
    tiles: Tensor,
    block_m: int,
    tile: Tile,
    out: Tensor,
    scatter: Optional[Tensor] = None,
    addition: Optional[Addition] = None,
    first_expert: int = 0,
    transposed: bool = False,
    rest: int = -1,
    first_col: int = 0,
) -> None:
    """Fills ``out`` with rows of a (M, K) times their expert's matrix; row i to ``out[scatter[i]]`` if given.

    Args:
        weight: (experts, N, K), or (experts, K, N) if ``transposed``, of all experts, or of a run of them from
            ``first_expert`` on, whose rows alone are computed.
        offsets, tiles: as ``tile_table`` makes them.
        out: (M, N), or (M, width) for a window of the N columns; those of a row are consecutive.
        rest: the label of tiles that get zeros, if ``weight`` is of all experts.
        first_col: where the window begins, a multiple of tile.block_n. So is its width, unless it ends at N.
    """
    experts, run = offsets.shape[0] - 1, weight.shape[0]
    n, k = weight.shape[2 if transposed else 1], a.shape[1]
    w = operand(weight, block_m, tile, transposed=transposed)
    low_rank, meta = addition_operand(addition)
    blocks = cdiv(out.shape[1], tile.block_n)
    pointers = a, w.data, w.descriptor, low_rank, out, scatter, tiles
    window = first_col // tile.block_n, blocks
    strides = *a.stride(), *w.strides, out.stride(0)
    settings = meta, block_m, tile.block_n, tile.block_k, w.w_rows, w.format, w.split
    if run == experts:
        launch(
            _linear_kernel, (tiles.shape[0] * blocks,), tile.num_warps, tile.num_stages, pointers, window,
            n, k, rest, *strides, *settings,
        )  # fmt: skip
    else:
        programs = cdiv(tiles.shape[0] * run, experts) * blocks  # one for each tile, if experts have as many
        launch(
            _linear_run_kernel, (programs,), tile.num_warps, tile.num_stages,
            (*pointers, offsets), (first_expert, first_expert + run, *window), n, k, *strides, *settings,
        )  # fmt: skip


def linear(input: Tensor, weight: Tensor, m_sizes: Tensor) -> Tensor:
    """out (M, N): each expert's rows of input (M, K) times its own matrix of weight (E, N, K)."""
    experts, n, k = weight.shape
    rows = input.shape[0]
    out = input.new_empty(rows, n)
    if out.numel():
        tiling = choose(rows, experts, input.dtype, input.device)
        tile = tiling.linear.fit(n, k)
        input, weight = near(input, tile.block_k), near(weight, tile.block_k)
        offsets, tiles = tile_table(m_sizes, rows, tiling.block_m, rest=experts)
        linear_tiles(input, weight, offsets, tiles, tiling.block_m, tile, out, rest=experts)
    return out
