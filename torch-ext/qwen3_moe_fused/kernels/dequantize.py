"""Dequantize: a 4-bit stack, or some experts of it, in full precision, equal in value to what bitsandbytes gives.

    out[i] = round(code[nibble i] * absmax[i // blocksize])

with the product in fp32. The kernel follows the flat order in memory, so any blocksize and any shape will do. Where
rows are many, decoding each weight once and multiplying dense tiles beats decoding it anew for each tile of rows;
``m_sizes`` then tells which experts have rows, and the others are left alone.
"""

from typing import Optional

import torch
import triton
import triton.language as tl

from ..projection import FourBitWeight
from ..regime import has_byte_permute
from ..tiling import cdiv
from .four_bit import FourBitPointers, absmax_of, lookup
from .launch import launch
from .nibbles import decode_exact

Tensor = torch.Tensor
BLOCK = 1024  # bytes or words per program


@triton.jit
def _decode_bytes(w, at, BLOCKSIZE: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr):
    """(..., 2) fp32 weights of the bytes whose first weights are numbered ``at``."""
    q = tl.load(w.packed + at // 2)
    absmax = absmax_of(w, at // BLOCKSIZE, NESTED_BLOCKSIZE)
    return tl.join(lookup(q >> 4, w.code) * absmax, lookup(q & 15, w.code) * absmax)


@triton.jit
def decode_words(q, ASSEMBLY: tl.constexpr):
    """(..., 8) fp32 codes of the nibbles of int32 words q (...,), by ``nibbles.decode_exact``."""
    v0, v1, v2, v3, v4, v5, v6, v7 = tl.inline_asm_elementwise(
        ASSEMBLY, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r", [q],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True, pack=1,
    )  # fmt: skip
    even, odd = tl.join(tl.join(v0, v4), tl.join(v2, v6)), tl.join(tl.join(v1, v5), tl.join(v3, v7))
    return tl.reshape(tl.join(even, odd), q.shape + [8])  # noqa: RUF005 (Triton unpacks no lists)


@triton.jit(do_not_specialize=["first"])
def _dequantize_kernel(
    # pointers
    w, m_sizes, out,
    # sizes
    first, SIZE: tl.constexpr,
    # meta
    BLOCKSIZE: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr, ASSEMBLY: tl.constexpr,
    BLOCK: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(SIZE, BLOCK * EACH), experts): BLOCK times EACH of one expert's SIZE weights, from ``first`` on.

    EACH is 2, a byte, or with ASSEMBLY 8, an int32 word. m_sizes (E,) or None; out (experts, SIZE).
    """
    expert = tl.program_id(1)
    if m_sizes is not None:
        if tl.load(m_sizes + first + expert) == 0:
            return
    weight = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)) * EACH
    at = (first + expert).to(tl.int64) * SIZE + tl.minimum(weight, SIZE - EACH)
    if ASSEMBLY is None:
        value = _decode_bytes(w, at, BLOCKSIZE, NESTED_BLOCKSIZE)
    else:
        absmax = absmax_of(w, at // BLOCKSIZE, NESTED_BLOCKSIZE)
        value = decode_words(tl.load(w.packed + at // 8), ASSEMBLY) * absmax[:, None]
    to = out + expert.to(tl.int64) * SIZE + weight[:, None] + tl.arange(0, EACH)[None, :]
    tl.store(to, value.to(out.dtype.element_ty), mask=(weight < SIZE)[:, None])


def dequantize_experts(weight: FourBitWeight, first: int, out: Tensor, m_sizes: Optional[Tensor] = None) -> None:
    """Fills ``out`` (experts, N, K), contiguous, with the experts from ``first`` on; those without rows stay as they
    are if ``m_sizes`` (E,) is given."""
    size = weight.shape[1] * weight.shape[2]
    pointers, assembly, each = FourBitPointers(*weight[:6]), None, 2
    if (
        has_byte_permute(out.device)
        and size % 8 == 0
        and weight.blocksize % 8 == 0
        and weight.packed.data_ptr() % 4 == 0
    ):
        pointers = FourBitPointers(weight.packed.view(torch.int32), *weight[1:6])
        assembly, each = decode_exact(weight.quant_type), 8
    if out.numel():
        launch(
            _dequantize_kernel, (cdiv(size, BLOCK * each), out.shape[0]), 4, 1,
            (pointers, m_sizes, out), (first,),
            size, weight.blocksize, weight.nested_blocksize, assembly, BLOCK, each,
            fp_fusion=False,
        )  # fmt: skip


def dequantize(weight: FourBitWeight, dtype: torch.dtype) -> Tensor:
    """The whole stack (E, N, K) in ``dtype``."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    dequantize_experts(weight, 0, out)
    return out
