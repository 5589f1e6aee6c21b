"""4-bit weights in plain Triton: how a tile of them is read, and their product with rows of a.

bitsandbytes packs a stack (E, N, K) row-major and flat: two weights per byte, the even one in the high nibble, and one
``absmax`` for each ``blocksize`` consecutive weights. A weight is ``code[nibble] * absmax``, in fp32, rounded once to
the dtype of a: exactly what bitsandbytes' own dequantize gives. ``absmax`` may be quantized itself, a byte that 256
values ``nested_code`` and one ``nested_absmax`` for each ``nested_blocksize`` bytes turn into a number; that happens
here too, in registers.

Loads, selects and dots are all it takes, so this path runs wherever Triton does, its interpreter included.
``four_bit_fast`` does the same with instructions that only some cards have.
"""

from typing import NamedTuple, Optional

import torch
import triton
import triton.language as tl

Tensor = torch.Tensor


class FourBitPointers(NamedTuple):
    """What of a ``FourBitWeight`` a kernel takes: its tensors, whose numbers the kernel gets as constants."""

    packed: Tensor
    absmax: Tensor
    code: Tensor
    nested_absmax: Optional[Tensor]
    nested_code: Optional[Tensor]
    nested_offset: Optional[Tensor]


@triton.jit
def absmax_of(w, block, NESTED_BLOCKSIZE: tl.constexpr):
    """fp32 absmax of the blocks numbered ``block``. Multiplied, rounded, added, rounded: a caller that wants
    bitsandbytes' bits launches without fusing the two."""
    absmax = tl.load(w.absmax + block)
    if NESTED_BLOCKSIZE:
        nested = tl.load(w.nested_absmax + block // NESTED_BLOCKSIZE)
        absmax = tl.load(w.nested_code + absmax.to(tl.int32)) * nested + tl.load(w.nested_offset)
    return absmax


@triton.jit
def lookup(nibble, code):
    """code[nibble], by a tree of selects between sixteen values in registers: several times faster than a gather."""
    odd = (nibble & 1) != 0
    c0 = tl.where(odd, tl.load(code + 1), tl.load(code))
    c1 = tl.where(odd, tl.load(code + 3), tl.load(code + 2))
    c2 = tl.where(odd, tl.load(code + 5), tl.load(code + 4))
    c3 = tl.where(odd, tl.load(code + 7), tl.load(code + 6))
    c4 = tl.where(odd, tl.load(code + 9), tl.load(code + 8))
    c5 = tl.where(odd, tl.load(code + 11), tl.load(code + 10))
    c6 = tl.where(odd, tl.load(code + 13), tl.load(code + 12))
    c7 = tl.where(odd, tl.load(code + 15), tl.load(code + 14))
    second = (nibble & 2) != 0
    c0 = tl.where(second, c1, c0)
    c2 = tl.where(second, c3, c2)
    c4 = tl.where(second, c5, c4)
    c6 = tl.where(second, c7, c6)
    third = (nibble & 4) != 0
    return tl.where(nibble > 7, tl.where(third, c6, c4), tl.where(third, c2, c0))


@triton.jit
def unpack(q, code):
    """(R, C) bytes -> (R, 2C) fp32 values of their nibbles, the high one first."""
    return tl.reshape(tl.join(lookup(q >> 4, code), lookup(q & 15, code)), (q.shape[0], 2 * q.shape[1]))


@triton.jit
def _decode(w, q, at, R: tl.constexpr, C: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr):
    """(R, C) fp32 weights of the bytes q (R, C / 2); row i starts at weight ``at[i]``, where C or a block does."""
    runs: tl.constexpr = (C + BLOCKSIZE - 1) // BLOCKSIZE
    block = at[:, None] // BLOCKSIZE + tl.arange(0, runs)[None, :]
    scale = absmax_of(w, block, NESTED_BLOCKSIZE)[:, :, None]
    return tl.reshape(tl.reshape(unpack(q, w.code), (R, runs, C // runs)) * scale, (R, C))


@triton.jit
def accumulate_four_bit(
    # pointers
    a, w,
    # where
    rows, cols, expert, col,
    # sizes
    N: tl.constexpr, K: tl.constexpr,
    # strides
    stride_am, stride_ak,
    # meta
    BLOCK_M: tl.constexpr, COLS: tl.constexpr, BLOCK_K: tl.constexpr, W_ROWS: tl.constexpr,
    FORMAT: tl.constexpr,
):  # fmt: skip
    """``product.accumulate`` for a packed stack, (E, N, K) with W_ROWS, else (E, K, N).

    FORMAT is ("plain", blocksize, nested blocksize). The packed dimension is a multiple of the blocksize, and K one of
    BLOCK_K. Without W_ROWS, columns run from ``col`` on, and N is a multiple of COLS.
    """
    k = tl.arange(0, BLOCK_K)
    dtype = a.dtype.element_ty
    a_tile = a + rows.to(tl.int64)[:, None] * stride_am + k[None, :] * stride_ak
    matrix = expert.to(tl.int64) * (N * K)
    acc = tl.zeros((BLOCK_M, COLS), tl.float32)
    for first in range(0, K, BLOCK_K):
        x = tl.load(a_tile)
        if W_ROWS:
            at = matrix + cols * K + first
            byte = at[:, None] // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
            y = _decode(w, tl.load(w.packed + byte), at, COLS, BLOCK_K, FORMAT[1], FORMAT[2])
            acc = tl.dot(x, y.to(dtype).T, acc, input_precision="ieee")
        else:
            at = matrix + (first + k) * N + col
            byte = at[:, None] // 2 + tl.arange(0, COLS // 2)[None, :]
            y = _decode(w, tl.load(w.packed + byte), at, BLOCK_K, COLS, FORMAT[1], FORMAT[2])
            acc = tl.dot(x, y.to(dtype), acc, input_precision="ieee")
        a_tile += BLOCK_K * stride_ak
    return acc
