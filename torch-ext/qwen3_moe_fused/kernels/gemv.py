"""gemv: the experts of a few tokens, each slot on its own, without sorting and without tensor cores.

While a model generates, most experts that are hit have one row. A product with one row is a matter of reading the
weights, so nothing is arranged for it: a program takes some rows of one slot's expert, decodes them as they come and
multiplies in fp32. Three launches make the layer, and none depends on the others' experts.

    intermediate[slot] = act(gate[e] @ x) * (up[e] @ x)     e the slot's expert, x its token
    out[slot]          = down[e] @ intermediate[slot]
"""

from typing import Optional

import torch
import triton
import triton.language as tl

from ..projection import FourBitWeight
from .activation import activate
from .dequantize import decode_words
from .four_bit import FourBitPointers, absmax_of
from .launch import launch
from .nibbles import decode_exact

Tensor = torch.Tensor


@triton.jit
def _products(
    x, w, row, K: tl.constexpr, stride_xk, R: tl.constexpr, WORDS: tl.constexpr, ASSEMBLY: tl.constexpr,
    BLOCKSIZE: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr,
):  # fmt: skip
    """w[row] @ x -> (R,) fp32, for rows numbered through the whole stack; WORDS of eight weights per step."""
    RUNS: tl.constexpr = WORDS // 8
    acc = tl.zeros((R, RUNS), tl.float32)
    for first in tl.static_range(0, K // 8, WORDS):
        word = first + tl.arange(0, WORDS)
        q = tl.load(w.packed + row[:, None] * (K // 8) + word[None, :], mask=(word < K // 8)[None, :], other=0)
        k = word[:, None] * 8 + tl.arange(0, 8)[None, :]
        y = tl.load(x + k * stride_xk, mask=k < K, other=0.0).to(tl.float32)
        run = tl.minimum(first // 8 + tl.arange(0, RUNS), K // 64 - 1)
        absmax = absmax_of(w, (row[:, None] * K + run[None, :] * 64) // BLOCKSIZE, NESTED_BLOCKSIZE)
        product = tl.sum(decode_words(q, ASSEMBLY) * y[None, :, :], 2)
        acc += tl.sum(tl.reshape(product, (R, RUNS, 8)), 2) * absmax
    return tl.sum(acc, 1)


@triton.jit
def _gemv_kernel(
    # pointers
    x, w, ids, out,
    # sizes
    N: tl.constexpr, K: tl.constexpr, E: tl.constexpr, SLOTS_A_ROW: tl.constexpr, ACTIVATION: tl.constexpr,
    # strides
    stride_xm, stride_xk,
    # meta
    BLOCK_N: tl.constexpr, WORDS: tl.constexpr, ASSEMBLY: tl.constexpr,
    BLOCKSIZE: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr,
):  # fmt: skip
    """Grid (S, N / BLOCK_N): one slot, BLOCK_N columns of out (S, N).

    x (S / SLOTS_A_ROW, K), ids (S,). w (E, N, K), or with ACTIVATION (E, 2N, K), gate rows before up rows. Slots whose
    expert is none of [0, E) are left out.
    """
    slot = tl.program_id(0)
    expert = tl.load(ids + slot)
    if (expert < 0) | (expert >= E):
        return
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    x += (slot // SLOTS_A_ROW).to(tl.int64) * stride_xm
    if ACTIVATION is None:
        result = _products(
            x, w, expert.to(tl.int64) * N + n, K, stride_xk, BLOCK_N, WORDS, ASSEMBLY, BLOCKSIZE, NESTED_BLOCKSIZE
        )
    else:
        lane = tl.arange(0, 2 * BLOCK_N)
        row = expert.to(tl.int64) * (2 * N) + tl.program_id(1) * BLOCK_N + lane // 2 + lane % 2 * N
        both = _products(x, w, row, K, stride_xk, 2 * BLOCK_N, WORDS, ASSEMBLY, BLOCKSIZE, NESTED_BLOCKSIZE)
        gate, up = tl.split(tl.reshape(both, (BLOCK_N, 2)))
        result = activate(gate, ACTIVATION) * up
    tl.store(out + slot.to(tl.int64) * N + n, result.to(out.dtype.element_ty))


def gemv(x: Tensor, weight: FourBitWeight, top_k_index: Tensor, out: Tensor, activation: Optional[str] = None) -> None:
    """Fills out (S, N) with each slot's expert applied to its row of x.

    Args:
        x: (T, K), one row per token, or (S, K), one per slot.
        weight: (E, N, K); with an activation (E, 2N, K), whose halves make act(gate) * up.
        top_k_index: (T, k), contiguous.
    """
    experts, _, k = weight.shape
    slots, n = out.shape
    block_n, words = (8, 128) if activation else (16, 32)
    launch(
        _gemv_kernel, (slots, n // block_n), 4, 1,
        (x, FourBitPointers(weight.packed.view(torch.int32), *weight[1:6]), top_k_index, out), (),
        n, k, experts, slots // x.shape[0], activation, *x.stride(),
        block_n, words, decode_exact(weight.quant_type), weight.blocksize, weight.nested_blocksize,
    )  # fmt: skip
