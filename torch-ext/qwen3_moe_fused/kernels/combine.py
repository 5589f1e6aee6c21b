"""Combine: the weighted sum of each token's k slots.

out[t] = sum_j top_k_weights[t, j] * slots[t * k + j], in fp32, j ascending, rounded once. The projection before it
writes one row a slot instead of adding atomically, so the sum has a fixed order and reruns are bit-identical.
"""

from typing import Optional

import torch
import triton
import triton.language as tl

Tensor = torch.Tensor


@triton.jit
def _combine_kernel(
    # pointers
    slots, weights, ids, out,
    # sizes
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr,
    # strides
    stride_wt, stride_wk,
    # meta
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Grid (T, cdiv(H, BLOCK_H)): one token, BLOCK_H columns. slots (T*K, H), weights (T, K) or None, ids (T, K)."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = cols < H
    acc = tl.zeros((BLOCK_H,), tl.float32)
    for j in tl.static_range(K):
        expert = tl.load(ids + token * K + j)
        kept = (expert >= 0) & (expert < E)
        row = tl.load(slots + (token * K + j) * H + cols, mask=inside & kept, other=0.0).to(tl.float32)
        if weights is not None:
            row *= tl.load(weights + token * stride_wt + j * stride_wk, mask=kept, other=0.0).to(tl.float32)
        acc += row
    tl.store(out + token * H + cols, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sum_parts_kernel(
    # pointers
    parts, ids, out,
    # sizes
    slots, PARTS: tl.constexpr, E: tl.constexpr,
    # meta
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(S, BLOCK),): BLOCK slots. parts (PARTS, S) fp32, ids (S,), out (S,)."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < slots
    expert = tl.load(ids + slot, mask=inside, other=E)
    kept = (expert >= 0) & (expert < E)
    acc = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(PARTS):
        acc += tl.load(parts + i * slots.to(tl.int64) + slot, mask=kept, other=0.0)
    tl.store(out + slot, acc.to(out.dtype.element_ty), mask=inside)


def combine(slots: Tensor, top_k_weights: Optional[Tensor], top_k_index: Tensor, num_experts: int) -> Tensor:
    """out (T, H): the sum of each token's slots, weighted if there are weights; skipped slots add nothing.

    Args:
        slots: (T*k, H), contiguous, slot t*k + j for token t's j-th choice.
        top_k_weights: (T, k) or None for a plain sum.
        top_k_index: (T, k), contiguous.
    """
    tokens, k = top_k_index.shape
    width = slots.shape[1]
    out = slots.new_empty(tokens, width)
    if out.numel():
        block = min(1024, triton.next_power_of_2(width))
        strides = (0, 0) if top_k_weights is None else top_k_weights.stride()
        _combine_kernel[(tokens, triton.cdiv(width, block))](
            slots, top_k_weights, top_k_index, out, width, k, num_experts, *strides, BLOCK_H=block
        )
    return out


def sum_parts(parts: Tensor, top_k_index: Tensor, num_experts: int, out: Tensor) -> Tensor:
    """out (T, k): the sum over the first dimension of parts (P, S); skipped slots, which nobody wrote, get zero."""
    slots = top_k_index.numel()
    if slots:
        _sum_parts_kernel[(triton.cdiv(slots, 512),)](
            parts, top_k_index, out, slots, parts.shape[0], num_experts, BLOCK=512
        )
    return out
