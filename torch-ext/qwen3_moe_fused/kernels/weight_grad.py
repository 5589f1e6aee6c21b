"""Weight gradient: out[e] = sum over e's rows of grad[row]^T x[row], for rows sorted by expert.

Either side may be given by token instead of by row (``order`` and ``top_k`` then say which token a row belongs to),
so the gathered copy of the tokens exists here no more than in forward. An expert without rows gets zeros.
"""

from typing import Optional

import torch
import triton
import triton.language as tl

from ..tiling import Tile, cdiv, choose
from .launch import launch
from .product import clamp
from .routing import tile_table

Tensor = torch.Tensor


@triton.jit
def _weight_grad_kernel(
    # pointers
    grad, x, out, order, offsets,
    # sizes
    N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr,
    # strides
    stride_gm, stride_gn, stride_xm, stride_xk,
    # meta
    GRAD_BY_TOKEN: tl.constexpr, X_BY_TOKEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(N, BLOCK_N) * cdiv(K, BLOCK_K), E): one expert's (BLOCK_N, BLOCK_K) block, summed over its rows.

    grad (M, N), x (M, K), out (E, N, K), order (M,) or None, offsets (E+1,).
    """
    expert = tl.program_id(1)
    blocks: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    n = tl.program_id(0) // blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    start = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    lane = tl.arange(0, BLOCK_M)
    grad_cols = grad + clamp(n, N, BLOCK_N).to(tl.int64)[:, None] * stride_gn
    x_cols = x + clamp(k, K, BLOCK_K).to(tl.int64)[None, :] * stride_xk
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for first in range(start, end, BLOCK_M):
        row = first + lane
        inside = row < end
        token = row
        if GRAD_BY_TOKEN or X_BY_TOKEN:
            token = tl.load(order + row, mask=inside, other=0) // TOP_K
        grad_row = (token if GRAD_BY_TOKEN else row).to(tl.int64)
        x_row = (token if X_BY_TOKEN else row).to(tl.int64)
        g = tl.load(grad_cols + grad_row[None, :] * stride_gm, mask=inside[None, :], other=0.0)
        y = tl.load(x_cols + x_row[:, None] * stride_xm, mask=inside[:, None], other=0.0)
        acc = tl.dot(g, y, acc, input_precision="ieee")
    at = out + expert.to(tl.int64) * (N * K) + n[:, None] * K + k[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])


def weight_grad_rows(
    grad: Tensor,
    x: Tensor,
    offsets: Tensor,
    block_m: int,
    tile: Tile,
    order: Optional[Tensor] = None,
    top_k: int = 1,
    grad_by_token: bool = False,
    x_by_token: bool = False,
) -> Tensor:
    """out (E, N, K) from grad (M, N) and x (M, K); a side given by token has T rows and is gathered as it is read."""
    experts, n, k = offsets.numel() - 1, grad.shape[1], x.shape[1]
    out = grad.new_empty(experts, n, k)
    if out.numel():
        grid = (cdiv(n, tile.block_n) * cdiv(k, tile.block_k), experts)
        launch(
            _weight_grad_kernel, grid, tile.num_warps, tile.num_stages,
            (grad, x, out, order, offsets), (), n, k, top_k, *grad.stride(), *x.stride(), grad_by_token, x_by_token,
            block_m, tile.block_n, tile.block_k,
        )  # fmt: skip
    return out


def weight_grad(grad_output: Tensor, input: Tensor, m_sizes: Tensor) -> Tensor:
    """out (E, N, K): each expert's grad_output (rows, N) transposed times its input (rows, K)."""
    rows = input.shape[0]
    tiling = choose(rows, m_sizes.numel(), input.dtype, input.device)
    offsets, _ = tile_table(m_sizes, rows, tiling.block_m, rest=-1)
    tile = tiling.weight_grad.fit(grad_output.shape[1], input.shape[1])
    return weight_grad_rows(grad_output, input, offsets, tiling.weight_grad_block_m, tile)
