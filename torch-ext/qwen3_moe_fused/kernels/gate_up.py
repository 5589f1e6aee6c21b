"""gate_up: hidden_states through both projections of the experts, and the gated activation, in one kernel.

Each program computes BLOCK_N gate columns and the same up columns as one product of 2 * BLOCK_N columns, so the
tokens, gathered by index as they are read, are loaded once for both, and act(gate) * up happens in registers.
"""

from typing import Optional

import torch
import triton
import triton.language as tl

from ..tiling import Tile, cdiv
from .activation import activate
from .four_bit_fast import permute_columns
from .launch import launch
from .lora import Addition, add_low_rank, addition_operand
from .product import Stored, accumulate, operand

Tensor = torch.Tensor


@triton.jit
def _gate_up_tile(
    x, w, w_desc, addition, pre_activation, intermediate, order, expert, first_expert, first, end, col,
    stride_xm, stride_xk, stride_we, stride_wn, stride_wk,
    I: tl.constexpr, H: tl.constexpr, TOP_K: tl.constexpr, ACTIVATION: tl.constexpr,
    LORA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, FORMAT: tl.constexpr,
    PERMUTE: tl.constexpr,
):  # fmt: skip
    row = first + tl.arange(0, BLOCK_M)
    valid = tl.minimum(row, end - 1)
    token = tl.load(order + valid) // TOP_K
    lane = tl.arange(0, 2 * BLOCK_N)
    both = tl.minimum(col + lane % BLOCK_N, I - 1) + lane // BLOCK_N * I
    acc = accumulate(
        x, w, w_desc, token, both, expert - first_expert, col, 2 * I, H, stride_xm, stride_xk, stride_we, stride_wn,
        stride_wk, BLOCK_M, 2 * BLOCK_N, BLOCK_K, True, 2, FORMAT,
    )  # fmt: skip
    acc = add_low_rank(acc, addition, valid, valid, both, expert, 2 * I, LORA)
    gate, up = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1)))
    cols = (col + tl.arange(0, BLOCK_N))[None, :]
    inside = (row < end)[:, None] & (cols < I)
    row = row.to(tl.int64)[:, None]
    if pre_activation is not None:
        at = pre_activation + row * (2 * I) + cols
        tl.store(at, gate.to(pre_activation.dtype.element_ty), mask=inside)
        tl.store(at + I, up.to(pre_activation.dtype.element_ty), mask=inside)
    gated = (activate(gate, ACTIVATION) * up).to(intermediate.dtype.element_ty)
    if PERMUTE:
        gated = permute_columns(gated)
    tl.store(intermediate + row * I + cols, gated, mask=inside)


@triton.jit(do_not_specialize=["first_expert", "last_expert"])
def _gate_up_kernel(
    # pointers
    x, w, w_desc, addition, pre_activation, intermediate, order, tiles,
    # sizes
    first_expert, last_expert, I: tl.constexpr, H: tl.constexpr, TOP_K: tl.constexpr, ACTIVATION: tl.constexpr,
    # strides
    stride_xm, stride_xk, stride_we, stride_wn, stride_wk,
    # meta
    LORA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, FORMAT: tl.constexpr,
    PERMUTE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Grid (tiles * cdiv(I, BLOCK_N),): one tile of rows, BLOCK_N gate columns and the same up columns.

    x (T, H), w (last_expert - first_expert, 2I, H): tiles of other experts are left out. pre_activation (S, 2I) or
    None, intermediate (S, I), order (S,). SPLIT as in linear; addition and LORA as in lora. PERMUTE orders the columns
    of intermediate for ``four_bit_fast``.
    """
    blocks: tl.constexpr = (I + BLOCK_N - 1) // BLOCK_N
    tile = tiles + tl.program_id(0) // blocks * 3
    col = tl.program_id(0) % blocks * BLOCK_N
    expert = tl.load(tile)
    if (expert < first_expert) | (expert >= last_expert):
        return
    first = tl.load(tile + 1)
    end = tl.load(tile + 2)
    if SPLIT:
        if end - first <= BLOCK_M // 2:
            _gate_up_tile(
                x, w, w_desc, addition, pre_activation, intermediate, order, expert, first_expert, first, end, col,
                stride_xm, stride_xk, stride_we, stride_wn, stride_wk, I, H, TOP_K, ACTIVATION, LORA, BLOCK_M // 2,
                BLOCK_N, BLOCK_K, FORMAT, PERMUTE,
            )  # fmt: skip
            return
    _gate_up_tile(
        x, w, w_desc, addition, pre_activation, intermediate, order, expert, first_expert, first, end, col, stride_xm,
        stride_xk, stride_we, stride_wn, stride_wk, I, H, TOP_K, ACTIVATION, LORA, BLOCK_M, BLOCK_N, BLOCK_K, FORMAT,
        PERMUTE,
    )  # fmt: skip


def gate_up(
    hidden_states: Tensor,
    weight: Stored,
    order: Tensor,
    tiles: Tensor,
    top_k: int,
    activation: str,
    block_m: int,
    tile: Tile,
    pre_activation: Optional[Tensor],
    intermediate: Tensor,
    addition: Optional[Addition] = None,
    first_expert: int = 0,
    permute: bool = False,
) -> None:
    """Fills intermediate (S, I), and pre_activation (S, 2I) if given, for the experts of ``weight`` (experts, 2I, H),
    of which the first is ``first_expert``. hidden_states (T, H).

    ``permute`` writes the columns of intermediate as ``four_bit_fast.permute_columns`` orders them.
    """
    experts, width, hidden = weight.shape[0], weight.shape[1] // 2, weight.shape[2]
    w = operand(weight, block_m, tile, halves=2)
    low_rank, meta = addition_operand(addition)
    grid = (tiles.shape[0] * cdiv(width, tile.block_n),)
    launch(
        _gate_up_kernel, grid, tile.num_warps, tile.num_stages,
        (hidden_states, w.data, w.descriptor, low_rank, pre_activation, intermediate, order, tiles),
        (first_expert, first_expert + experts),
        width, hidden, top_k, activation, *hidden_states.stride(), *w.strides,
        meta, block_m, tile.block_n, tile.block_k, w.format, permute, w.split,
    )  # fmt: skip
