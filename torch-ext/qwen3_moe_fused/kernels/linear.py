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
def _linear_block(
    at, a, w, w_desc, addition, out, scatter, tiles, first_expert, first_block, blocks,
    stride_am, stride_ak, stride_we, stride_wn, stride_wk, stride_om,
    N: tl.constexpr, K: tl.constexpr, REST: tl.constexpr, LORA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, W_ROWS: tl.constexpr, FORMAT: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """Block ``at``, where each tile has ``blocks``. With SPLIT, half a tile where that will do: an expert's last one
    seldom is full."""
    tile = tiles + at // blocks * 3
    col = (first_block + at % blocks) * BLOCK_N
    expert = tl.load(tile)
    first = tl.load(tile + 1)
    end = tl.load(tile + 2)
    if (expert == REST) & (REST >= 0):
        row = first + tl.arange(0, BLOCK_M)
        cols = col + tl.arange(0, BLOCK_N)
        zeros = tl.zeros((BLOCK_M, BLOCK_N), out.dtype.element_ty)
        to = out + row.to(tl.int64)[:, None] * stride_om + cols[None, :]
        tl.store(to, zeros, mask=(row < end)[:, None] & (cols < N)[None, :])
    elif expert >= 0:
        if SPLIT and end - first <= BLOCK_M // 2:
            _linear_tile(
                a, w, w_desc, addition, out, scatter, expert, first_expert, first, end, col, stride_am, stride_ak,
                stride_we, stride_wn, stride_wk, stride_om, N, K, LORA, BLOCK_M // 2, BLOCK_N, BLOCK_K, W_ROWS, FORMAT,
            )  # fmt: skip
        else:
            _linear_tile(
                a, w, w_desc, addition, out, scatter, expert, first_expert, first, end, col, stride_am, stride_ak,
                stride_we, stride_wn, stride_wk, stride_om, N, K, LORA, BLOCK_M, BLOCK_N, BLOCK_K, W_ROWS, FORMAT,
            )  # fmt: skip


@triton.jit(do_not_specialize=["first_expert", "last_expert", "first_block", "blocks"])
def _linear_kernel(
    # pointers
    a, w, w_desc, addition, out, scatter, tiles, offsets,
    # sizes
    first_expert, last_expert, first_block, blocks, N: tl.constexpr, K: tl.constexpr, REST: tl.constexpr,
    # strides
    stride_am, stride_ak, stride_we, stride_wn, stride_wk, stride_om,
    # meta
    LORA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    W_ROWS: tl.constexpr, FORMAT: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Grid (tiles * blocks,): one tile of rows, BLOCK_N columns; with offsets (programs,), of any number.

    a (M, K), w (last_expert - first_expert, N, K). out (M, .) holds a window of the N columns: ``blocks`` blocks, of
    which the first is ``first_block``. scatter (M,) or None: row i goes to out[scatter[i]]. Tiles of "expert" REST get
    zeros. addition and LORA as in lora, scatter then tells the slots.

    offsets (E+1,), or None if w is of all experts. Which tiles a run of them has, only the device knows: its entries of
    ``tiles`` are found by offsets, see routing, and the programs take their blocks in turns. With a program for each
    tile there is, most would find that it is not the run's.
    """
    out -= first_block * BLOCK_N
    if offsets is None:
        _linear_block(
            tl.program_id(0), a, w, w_desc, addition, out, scatter, tiles, first_expert, first_block, blocks,
            stride_am, stride_ak, stride_we, stride_wn, stride_wk, stride_om, N, K, REST, LORA, BLOCK_M, BLOCK_N,
            BLOCK_K, W_ROWS, FORMAT, SPLIT,
        )  # fmt: skip
    else:
        begin = tl.load(offsets + first_expert) // BLOCK_M + first_expert
        stop = tl.load(offsets + last_expert) // BLOCK_M + last_expert
        for at in range(begin * blocks + tl.program_id(0), stop * blocks, tl.num_programs(0)):
            _linear_block(
                at, a, w, w_desc, addition, out, scatter, tiles, first_expert, first_block, blocks,
                stride_am, stride_ak, stride_we, stride_wn, stride_wk, stride_om, N, K, REST, LORA, BLOCK_M, BLOCK_N,
                BLOCK_K, W_ROWS, FORMAT, SPLIT,
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
        rest: the label of tiles that get zeros; a run of experts has none.
        first_col: where the window begins, a multiple of tile.block_n. So is its width, unless it ends at N.
    """
    experts, run = offsets.shape[0] - 1, weight.shape[0]
    n, k = weight.shape[2 if transposed else 1], a.shape[1]
    w = operand(weight, block_m, tile, transposed=transposed)
    low_rank, meta = addition_operand(addition)
    blocks = cdiv(out.shape[1], tile.block_n)
    whole = run == experts
    share = tiles.shape[0] if whole else cdiv(tiles.shape[0] * run, experts)  # as if all experts had as many
    launch(
        _linear_kernel, (share * blocks,), tile.num_warps, tile.num_stages,
        (a, w.data, w.descriptor, low_rank, out, scatter, tiles, None if whole else offsets),
        (first_expert, first_expert + run, first_col // tile.block_n, blocks),
        n, k, rest, *a.stride(), *w.strides, out.stride(0),
        meta, block_m, tile.block_n, tile.block_k, w.w_rows, w.format, w.split,
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
