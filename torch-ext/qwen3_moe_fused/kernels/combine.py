"""Combine: the weighted sum of each token's k slots.

out[t] = sum_j top_k_weights[t, j] * slots[t * k + j], in fp32, j ascending, rounded once. The projection before it
writes one row per slot instead of adding atomically, so the sum has a fixed order and reruns are bit-identical.

No column knows of another: what is called H here may be half of the hidden size, see ``regime.window``.
"""

from typing import Optional

import torch
import triton
import triton.language as tl

from ..tiling import cdiv, next_power_of_2
from .launch import launch

Tensor = torch.Tensor


@triton.jit
def _combine_kernel(
    # pointers
    slots, weights, ids, out,
    # sizes
    H, K: tl.constexpr, E: tl.constexpr,
    # strides
    stride_wt, stride_wk, stride_sm, stride_om,
    # meta
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Grid (T, cdiv(H, BLOCK_H)): one token, BLOCK_H columns.

    slots (T*K, H), weights (T, K), ids (T, K), out (T, H).
    """
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = cols < H
    acc = tl.zeros((BLOCK_H,), tl.float32)
    for j in tl.static_range(K):
        expert = tl.load(ids + token * K + j)
        kept = (expert >= 0) & (expert < E)
        row = tl.load(slots + (token * K + j) * stride_sm + cols, mask=inside & kept, other=0.0).to(tl.float32)
        acc += row * tl.load(weights + token * stride_wt + j * stride_wk, mask=kept, other=0.0).to(tl.float32)
    tl.store(out + token * stride_om + cols, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count"])
def _combine_backward_kernel(
    # pointers
    slots, parts, ids, out, grad_weights,
    # sizes
    count, H, K: tl.constexpr, E: tl.constexpr, PARTS: tl.constexpr,
    # strides
    stride_sm, stride_om,
    # meta
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (T, cdiv(H, BLOCK_H)), or (T, 1) without ``out``: one token, BLOCK_H columns.

    slots (T*K, H) -> out (T, H), both or none; parts (PARTS, count = T*K) fp32 -> grad_weights (T, K), both or none.
    """
    token = tl.program_id(0).to(tl.int64)
    if out is not None:
        cols = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        inside = cols < H
        acc = tl.zeros((BLOCK_H,), tl.float32)
        for j in tl.static_range(K):
            expert = tl.load(ids + token * K + j)
            kept = (expert >= 0) & (expert < E)
            acc += tl.load(slots + (token * K + j) * stride_sm + cols, mask=inside & kept, other=0.0).to(tl.float32)
        tl.store(out + token * stride_om + cols, acc.to(out.dtype.element_ty), mask=inside)
    if grad_weights is not None:
        if tl.program_id(1) == 0:
            choice = tl.arange(0, BLOCK_K)
            experts = tl.load(ids + token * K + choice, mask=choice < K, other=E)
            written = (experts >= 0) & (experts < E)
            total = tl.zeros((BLOCK_K,), tl.float32)
            for part in tl.static_range(PARTS):
                total += tl.load(parts + part * count.to(tl.int64) + token * K + choice, mask=written, other=0.0)
            tl.store(grad_weights + token * K + choice, total.to(grad_weights.dtype.element_ty), mask=choice < K)


def combine(slots: Tensor, top_k_weights: Tensor, top_k_index: Tensor, num_experts: int, out: Tensor) -> None:
    """Fills out (T, H), the weighted sum of each token's slots; skipped slots, which nobody wrote, add nothing.

    Args:
        slots: (T*k, H), slot t*k + j for token t's j-th choice; here and in ``out``, a row's columns are consecutive.
        top_k_weights: (T, k), any strides.
        top_k_index: (T, k), contiguous.
    """
    tokens, k = top_k_index.shape
    width = slots.shape[1]
    if out.numel():
        block = min(1024, next_power_of_2(width))
        launch(
            _combine_kernel, (tokens, cdiv(width, block)), 4, 1,
            (slots, top_k_weights, top_k_index, out), (),
            width, k, num_experts, *top_k_weights.stride(), slots.stride(0), out.stride(0), block,
        )  # fmt: skip


def combine_backward(
    slots: Optional[Tensor],
    parts: Optional[Tensor],
    top_k_index: Tensor,
    num_experts: int,
    out: Optional[Tensor],
    grad_weights: Optional[Tensor],
) -> None:
    """Fills the gradients that are sums over slots or parts, in one launch; skipped slots get or add zero.

    Args:
        slots, out: (T*k, H) gradient of each slot's token, and (T, H) of hidden_states; or None if nobody asked. The
            columns of a row are consecutive.
        parts, grad_weights: (P, T*k) fp32, parts of the gradient of top_k_weights, and (T, k), itself; or None.
        top_k_index: (T, k), contiguous.
    """
    tokens, k = top_k_index.shape
    width, strides = (1, (0, 0)) if slots is None else (slots.shape[1], (slots.stride(0), out.stride(0)))
    count, terms = (0, 0) if parts is None else (parts.shape[1], parts.shape[0])
    if tokens:
        block = min(1024, next_power_of_2(width))
        launch(
            _combine_backward_kernel, (tokens, max(1, cdiv(width, block))), 4, 1,
            (slots, parts, top_k_index, out, grad_weights), (count,),
            width, k, num_experts, terms, *strides, block, next_power_of_2(k),
        )  # fmt: skip
