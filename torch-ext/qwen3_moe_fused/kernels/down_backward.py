"""down_backward: from the gradient of the layer's output back to that of the pre-activation, in one kernel.

With g = down_proj[e]^T @ grad_output[token] (gathered by index as it is read), everything else is elementwise on
the tile in registers:

    grad of gate          = weight * g * up * act'(gate)
    grad of up            = weight * g * act(gate)
    grad of top_k_weights = sum_i g_i * act(gate_i) * up_i

The last is a sum over all columns; each program adds up its own, in ``parts``, and ``combine_backward`` adds the
programs' in a fixed order. That needs the unweighted output of no slot, so none is kept from forward.
"""

from typing import Optional

import torch
import triton
import triton.language as tl

from ..tiling import Tile
from .activation import activate_with_slope
from .launch import launch
from .lora import Addition, add_low_rank, addition_operand
from .product import Stored, accumulate, clamp, operand

Tensor = torch.Tensor


@triton.jit
def _through_activation(
    g, pre_activation, grad_pre_activation, weighted, weight, row, end, col,
    I: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Stores the gradients for one piece g (rows, cols) and returns its part (rows,) of the gradient of the weights."""
    cols = col + tl.arange(0, g.shape[1])[None, :]
    inside = (row < end)[:, None] & (cols < I)
    row = row.to(tl.int64)[:, None]
    at = row * (2 * I) + cols
    dtype = grad_pre_activation.dtype.element_ty
    gate = tl.load(pre_activation + at, mask=inside, other=0.0).to(tl.float32)
    activated, slope = activate_with_slope(gate, ACTIVATION)
    tl.store(grad_pre_activation + at + I, (weight * g * activated).to(dtype), mask=inside)
    up = tl.load(pre_activation + at + I, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad_pre_activation + at, (weight * g * up * slope).to(dtype), mask=inside)
    intermediate = activated * up
    if weighted is not None:
        tl.store(weighted + row * I + cols, (weight * intermediate).to(dtype), mask=inside)
    return tl.sum(tl.where(inside, g * intermediate, 0.0), 1)


@triton.jit
def _halves(g):
    """The left and the right columns of g."""
    return tl.split(tl.permute(tl.reshape(g, (g.shape[0], 2, g.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _two_pieces(
    g, pre_activation, grad_pre_activation, weighted, weight, row, end, col,
    I: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    left, right = _halves(g)
    half: tl.constexpr = g.shape[1] // 2
    part = _through_activation(
        left, pre_activation, grad_pre_activation, weighted, weight, row, end, col, I, ACTIVATION
    )
    return part + _through_activation(
        right, pre_activation, grad_pre_activation, weighted, weight, row, end, col + half, I, ACTIVATION
    )


@triton.jit
def _down_backward_tile(
    grad, w, w_desc, addition, pre_activation, weights, order, grad_pre_activation, weighted, parts,
    expert, first_expert, first, end, col, block, slots, stride_gm, stride_gk, stride_we, stride_wn, stride_wk,
    stride_wt, stride_wj,
    I: tl.constexpr, H: tl.constexpr, TOP_K: tl.constexpr, ACTIVATION: tl.constexpr, LORA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, W_ROWS: tl.constexpr,
    FORMAT: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    row = first + tl.arange(0, BLOCK_M)
    valid = tl.minimum(row, end - 1)
    slot = tl.load(order + valid)
    token = slot // TOP_K
    clamped = clamp(col + tl.arange(0, BLOCK_N), I, BLOCK_N)
    g = accumulate(
        grad, w, w_desc, token, clamped, expert - first_expert, col, I, H,
        stride_gm, stride_gk, stride_we, stride_wn, stride_wk, BLOCK_M, BLOCK_N, BLOCK_K, W_ROWS, 1, FORMAT,
    )  # fmt: skip
    g = add_low_rank(g, addition, valid, slot, clamped, expert, I, LORA)
    weight = tl.load(weights + token * stride_wt + slot % TOP_K * stride_wj).to(tl.float32)[:, None]
    # In pieces of at most PIECE elements: all at once, gate, up and their gradients would not fit in registers.
    if BLOCK_M * BLOCK_N > 2 * PIECE:
        left, right = _halves(g)
        part = _two_pieces(left, pre_activation, grad_pre_activation, weighted, weight, row, end, col, I, ACTIVATION)
        part += _two_pieces(
            right, pre_activation, grad_pre_activation, weighted, weight, row, end, col + BLOCK_N // 2, I, ACTIVATION
        )
    elif BLOCK_M * BLOCK_N > PIECE:
        part = _two_pieces(g, pre_activation, grad_pre_activation, weighted, weight, row, end, col, I, ACTIVATION)
    else:
        part = _through_activation(
            g, pre_activation, grad_pre_activation, weighted, weight, row, end, col, I, ACTIVATION
        )
    tl.store(parts + block.to(tl.int64) * slots + slot, part, mask=row < end)


@triton.jit(do_not_specialize=["first_expert", "last_expert", "slots"])
def _down_backward_kernel(
    # pointers
    grad, w, w_desc, addition, pre_activation, weights, order, tiles, grad_pre_activation, weighted, parts,
    # sizes
    first_expert, last_expert, slots, I: tl.constexpr, H: tl.constexpr, TOP_K: tl.constexpr, ACTIVATION: tl.constexpr,
    # strides
    stride_gm, stride_gk, stride_we, stride_wn, stride_wk, stride_wt, stride_wj,
    # meta
    LORA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    W_ROWS: tl.constexpr, FORMAT: tl.constexpr, PIECE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Grid (tiles * cdiv(I, BLOCK_N),): one tile of rows, BLOCK_N columns of the intermediate size.

    grad (T, H), w (last_expert - first_expert, I, H) as a view of down_proj: tiles of other experts are left out.
    pre_activation and grad_pre_activation (S, 2I), weights (T, k),
    weighted (S, I) or None: weight * act(gate) * up, which the gradients of down_proj and of its adapter's A need;
    parts (blocks, S) fp32; SPLIT as in linear; addition and LORA as in lora.
    """
    blocks: tl.constexpr = (I + BLOCK_N - 1) // BLOCK_N
    tile = tiles + tl.program_id(0) // blocks * 3
    block = tl.program_id(0) % blocks
    expert = tl.load(tile)
    if (expert < first_expert) | (expert >= last_expert):
        return
    first = tl.load(tile + 1)
    end = tl.load(tile + 2)
    if SPLIT:
        if end - first <= BLOCK_M // 2:
            _down_backward_tile(
                grad, w, w_desc, addition, pre_activation, weights, order, grad_pre_activation, weighted, parts,
                expert, first_expert, first, end, block * BLOCK_N, block, slots, stride_gm, stride_gk, stride_we,
                stride_wn, stride_wk, stride_wt, stride_wj, I, H, TOP_K, ACTIVATION, LORA, BLOCK_M // 2, BLOCK_N,
                BLOCK_K, W_ROWS, FORMAT, PIECE,
            )  # fmt: skip
            return
    _down_backward_tile(
        grad, w, w_desc, addition, pre_activation, weights, order, grad_pre_activation, weighted, parts,
        expert, first_expert, first, end, block * BLOCK_N, block, slots, stride_gm, stride_gk, stride_we, stride_wn,
        stride_wk, stride_wt, stride_wj, I, H, TOP_K, ACTIVATION, LORA, BLOCK_M, BLOCK_N, BLOCK_K, W_ROWS, FORMAT,
        PIECE,
    )  # fmt: skip


def down_backward(
    grad_output: Tensor,
    down_proj: Stored,
    pre_activation: Tensor,
    top_k_weights: Tensor,
    order: Tensor,
    tiles: Tensor,
    activation: str,
    block_m: int,
    tile: Tile,
    grad_pre_activation: Tensor,
    parts: Tensor,
    weighted: Optional[Tensor],
    addition: Optional[Addition] = None,
    first_expert: int = 0,
) -> None:
    """Fills grad_pre_activation (S, 2I), parts (cdiv(I, tile.block_n), S), whose sum is the gradient of top_k_weights,
    and weighted (S, I) if given, for the experts of down_proj (experts, H, I), of which the first is ``first_expert``.

    grad_output (T, H), top_k_weights (T, k), any strides.
    """
    experts, hidden, width = down_proj.shape
    low_rank, meta = addition_operand(addition)
    w = operand(down_proj, block_m, tile, transposed=True)
    launch(
        _down_backward_kernel, (tiles.shape[0] * parts.shape[0],), tile.num_warps, tile.num_stages,
        (grad_output, w.data, w.descriptor, low_rank, pre_activation, top_k_weights, order, tiles,
         grad_pre_activation, weighted, parts), (first_expert, first_expert + experts, order.numel()),
        width, hidden, top_k_weights.shape[1], activation,
        *grad_output.stride(), *w.strides, *top_k_weights.stride(),
        meta, block_m, tile.block_n, tile.block_k, w.w_rows, w.format, 1024 * tile.num_warps, w.split,
    )  # fmt: skip
