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
from .launch import launch
from .lora import Addition, add_low_rank, addition_operand
from .product import accumulate, weight_operand

Tensor = torch.Tensor


@triton.jit
def _gate_up_tile(
    x, w, w_desc, addition, pre_activation, intermediate, order, expert, first, end, col,
    stride_xm, stride_xk, stride_we, stride_wn, stride_wk,
    I: tl.constexpr, H: tl.constexpr, TOP_K: tl.constexpr, ACTIVATION: tl.constexpr,
    LORA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = first + tl.arange(0, BLOCK_M)
    valid = tl.minimum(row, end - 1)
    token = tl.load(order + valid) // TOP_K
    lane = tl.arange(0, 2 * BLOCK_N)
    both = tl.minimum(col + lane % BLOCK_N, I - 1) + lane // BLOCK_N * I
    acc = accumulate(
        x, w, w_desc, token, both, expert, col, H, stride_xm, stride_xk, stride_we, stride_wn, stride_wk,
        BLOCK_M, 2 * BLOCK_N, BLOCK_K, True, 2,
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
    gated = activate(gate, ACTIVATION) * up
    tl.store(intermediate + row * I + cols, gated.to(intermediate.dtype.element_ty), mask=inside)


@triton.jit
def _gate_up_kernel(
    # pointers
    x, w, w_desc, addition, pre_activation, intermediate, order, tiles,
    # sizes
    I: tl.constexpr, H: tl.constexpr, TOP_K: tl.constexpr, ACTIVATION: tl.constexpr,
    # strides
    stride_xm, stride_xk, stride_we, stride_wn, stride_wk,
    # meta
    LORA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Grid (tiles * cdiv(I, BLOCK_N),): one tile of rows, BLOCK_N gate columns and the same up columns.

    x (T, H), w (E, 2I, H), pre_activation (S, 2I) or None, intermediate (S, I), order (S,). SPLIT as in linear;
    addition and LORA as in lora.
    """
    blocks: tl.constexpr = (I + BLOCK_N - 1) // BLOCK_N
    tile = tiles + tl.program_id(0) // blocks * 3
    col = tl.program_id(0) % blocks * BLOCK_N
    expert = tl.load(tile)
    if expert < 0:
        return
    first = tl.load(tile + 1)
    end = tl.load(tile + 2)
    if SPLIT:
        if end - first <= BLOCK_M // 2:
            _gate_up_tile(
                x, w, w_desc, addition, pre_activation, intermediate, order, expert, first, end, col, stride_xm,
                stride_xk, stride_we, stride_wn, stride_wk, I, H, TOP_K, ACTIVATION, LORA, BLOCK_M // 2, BLOCK_N,
                BLOCK_K,
            )  # fmt: skip
            return
    _gate_up_tile(
        x, w, w_desc, addition, pre_activation, intermediate, order, expert, first, end, col, stride_xm, stride_xk,
        stride_we, stride_wn, stride_wk, I, H, TOP_K, ACTIVATION, LORA, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip


def gate_up(
    hidden_states: Tensor,
    weight: Tensor,
    order: Tensor,
    tiles: Tensor,
    top_k: int,
    activation: str,
    block_m: int,
    tile: Tile,
    pre_activation: Optional[Tensor],
    addition: Optional[Addition] = None,
) -> Tensor:
    """intermediate (S, I) of hidden_states (T, H) and weight (E, 2I, H); fills pre_activation (S, 2I) if given."""
    width, hidden = weight.shape[1] // 2, weight.shape[2]
    intermediate = hidden_states.new_empty(order.numel(), width)
    operand = weight_operand(weight, block_m, tile, halves=2)
    low_rank, meta = addition_operand(addition)
    grid = (tiles.shape[0] * cdiv(width, tile.block_n),)
    launch(
        _gate_up_kernel, grid, tile.num_warps, tile.num_stages,
        hidden_states, operand.data, operand.descriptor, low_rank, pre_activation, intermediate, order, tiles,
        width, hidden, top_k, activation, *hidden_states.stride(), *operand.strides,
        meta, block_m, tile.block_n, tile.block_k, block_m >= 128,
    )  # fmt: skip
    return intermediate
