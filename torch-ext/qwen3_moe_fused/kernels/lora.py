"""Adapters: what a low-rank addition to a projection needs beside the projection's own kernel.

Let F (N, R), R small, be one expert's matrix of a :class:`Factor`. Three products are all there is:

    low_rank       rows of a (M, N) times F: x A^T on the way forward, grad B on the way back. A kernel of its own,
                   once a projection: inside the projection's, each block of columns would compute it again.
    add_low_rank   those R columns times F^T: B on the way forward, A on the way back. One more step of the sum that
                   the projection's kernel is at, so W + B A exists nowhere.
    factor_grads   an expert's rows reduced to the gradients of its A and B, without that of W.

``scaling`` is multiplied into the results of low_rank before they are rounded, and by that into all the others.

If gate and up have an A each, stacked, then R is twice the rank, and F made of B has each half of B's rows in columns
of its own and zeros elsewhere, which are made as it is read.

Dropout is a hash of seed, slot and column, see ``reference.keep_mask``: whoever needs the mask computes it.
"""

from typing import NamedTuple, Optional, Tuple

import torch
import triton
import triton.language as tl

from ..tiling import next_power_of_2
from .four_bit_fast import column_at
from .product import clamp

Tensor = torch.Tensor


class FactorPointers(NamedTuple):
    """What a kernel takes as a factor."""

    data: Tensor
    stride_e: int
    stride_n: int
    stride_r: int


class Factor(NamedTuple):
    """One of an adapter's factors as F (E, N, R), R = halves * rank, of which (E, N, rank) is stored."""

    pointers: FactorPointers
    n: int
    rank: int
    halves: int


class AdditionPointers(NamedTuple):
    """What a projection's kernel takes as ``addition``: a factor's and two more. Not nested, Triton loses count."""

    data: Tensor
    stride_e: int
    stride_n: int
    stride_r: int
    low_rank: Tensor
    seed: Optional[Tensor]


class Addition(NamedTuple):
    """What a projection's kernel adds: low_rank (M, R) times the transpose of a factor, where dropout keeps it."""

    low_rank: Tensor
    factor: Factor
    seed: Optional[Tensor] = None
    dropout: float = 0.0
    stream: int = 0


@triton.jit
def _mix32(x):
    """The 32-bit finalizer of MurmurHash3 (public domain), of uint32."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _kept(slots, cols, seed, N: tl.constexpr, DROP: tl.constexpr, STREAM: tl.constexpr):
    """Which of the elements (slots, cols) of N columns dropout keeps; DROP is the share it drops, times 2^32."""
    key = _mix32((tl.load(seed) * 2 + STREAM).to(tl.uint32))
    position = slots.to(tl.uint32)[:, None] * N + cols.to(tl.uint32)[None, :]
    return _mix32(_mix32(position) ^ key) >= tl.full((1, 1), DROP, tl.uint32)


@triton.jit
def _load_factor(
    factor, expert, n, r, N: tl.constexpr, RANK: tl.constexpr, HALVES: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """Elements (n, r) of an expert's F; zero past its ends, which are not looked for if all are WHOLE."""
    at = factor.data + expert.to(tl.int64) * factor.stride_e + n.to(tl.int64) * factor.stride_n
    if HALVES == 2:
        own = r - n // (N // 2) * RANK
        return tl.load(at + own * factor.stride_r, mask=(own >= 0) & (own < RANK) & (n < N), other=0.0)
    elif WHOLE:
        return tl.load(at + r * factor.stride_r)
    else:
        return tl.load(at + r * factor.stride_r, mask=(r < RANK) & (n < N), other=0.0)


@triton.jit
def add_low_rank(acc, addition, rows, slots, cols, expert, N: tl.constexpr, LORA: tl.constexpr):
    """acc + low_rank[rows] @ F[cols]^T, with dropout for the elements (slots, cols) alone; acc itself if there is no
    addition. rows, slots and cols are valid numbers. LORA as :func:`addition_operand` makes it.
    """
    if LORA is None:
        return acc
    else:
        RANK: tl.constexpr = LORA[0]
        HALVES: tl.constexpr = LORA[1]
        STEP: tl.constexpr = LORA[2]
        DROP: tl.constexpr = LORA[3]
        R: tl.constexpr = RANK * HALVES
        total = acc
        if DROP:
            total = tl.zeros_like(acc)
        for first in tl.static_range(0, R, STEP):
            r = first + tl.arange(0, STEP)
            at = addition.low_rank + rows.to(tl.int64)[:, None] * R + r[None, :]
            if R % STEP == 0:
                a = tl.load(at)
            else:
                a = tl.load(at, mask=(r < R)[None, :], other=0.0)
            f = _load_factor(addition, expert, cols[None, :], r[:, None], N, RANK, HALVES, R % STEP == 0)
            total = tl.dot(a, f.to(a.dtype), total, input_precision="ieee")
        if DROP:
            kept = _kept(slots, cols, addition.seed, N, DROP, LORA[4])
            total = acc + tl.where(kept, total * (1.0 / (1.0 - DROP / 4294967296.0)), 0.0)
        return total


def drop_bound(dropout: float) -> int:
    """Hashes below this drop their element."""
    return int(dropout * 2**32)


def addition_operand(addition: Optional[Addition]) -> Tuple[Optional[AdditionPointers], Optional[Tuple]]:
    """``addition`` and LORA as a projection kernel takes them: rank, halves, columns per step, dropout, its stream."""
    if addition is None:
        return None, None
    low_rank, factor, seed, dropout, stream = addition
    step = min(64, max(16, next_power_of_2(factor.rank * factor.halves)))
    meta = (factor.rank, factor.halves, step, drop_bound(dropout), stream)
    return AdditionPointers(*factor.pointers, low_rank, seed), meta


@triton.jit(do_not_specialize=["pieces"])
def low_rank_kernel(
    # pointers
    a, factor, order, tiles, seed, out,
    # sizes
    pieces, scale, N: tl.constexpr, RANK: tl.constexpr, HALVES: tl.constexpr, TOP_K: tl.constexpr,
    # strides
    stride_am, stride_an,
    # meta
    BY_TOKEN: tl.constexpr, PERMUTED: tl.constexpr, DROP: tl.constexpr, STREAM: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (tiles * pieces * cdiv(R, BLOCK_R),): one of a tile's pieces of ROWS rows, BLOCK_R columns.

    a (M, N), or (T, N) if BY_TOKEN, its columns PERMUTED as in four_bit_fast or not; factor (E, N, R), out (M, R).
    """
    R: tl.constexpr = RANK * HALVES
    blocks: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    piece = tl.program_id(0) // blocks
    tile = tiles + piece // pieces * 3
    expert = tl.load(tile)
    if expert < 0:
        return
    first = tl.load(tile + 1) + piece % pieces * ROWS
    end = tl.load(tile + 2)
    if first >= end:
        return
    row = first + tl.arange(0, ROWS)
    valid = tl.minimum(row, end - 1)
    slot = tl.load(order + valid)
    source = valid
    if BY_TOKEN:
        source = slot // TOP_K
    r = tl.program_id(0) % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    lane = tl.arange(0, BLOCK_N)
    whole: tl.constexpr = N % BLOCK_N == 0
    a_rows = a + source.to(tl.int64)[:, None] * stride_am
    acc = tl.zeros((ROWS, BLOCK_R), tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + lane
        at = a_rows + n.to(tl.int64)[None, :] * stride_an
        if whole:
            x = tl.load(at)
        else:
            x = tl.load(at, mask=(n < N)[None, :], other=0.0)
        if PERMUTED:
            n = column_at(n)
        if DROP:
            x = tl.where(_kept(slot, n, seed, N, DROP, STREAM), x, 0.0)
        f = _load_factor(factor, expert, n[:, None], r[None, :], N, RANK, HALVES, whole and R % BLOCK_R == 0)
        acc = tl.dot(x, f.to(x.dtype), acc, input_precision="ieee")
    at = out + row.to(tl.int64)[:, None] * R + r[None, :]
    tl.store(at, (acc * scale).to(out.dtype.element_ty), mask=(row < end)[:, None] & (r < R)[None, :])


@triton.jit
def _reduce(
    # pointers
    thin, wide, order, weights, seed,
    # where
    r, cols, start, end,
    # sizes
    R: tl.constexpr, N: tl.constexpr, TOP_K: tl.constexpr,
    # strides
    stride_wide_m, stride_wide_n, stride_wt, stride_wj,
    # meta
    BY_TOKEN: tl.constexpr, DROP: tl.constexpr, STREAM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """sum over the rows from start to end of thin[row, r] * wide[row, cols] -> (BLOCK_R, BLOCK_N) fp32, each row times
    its routing weight if those are given.

    thin (M, R), wide (M, N) or (T, N) if BY_TOKEN. No tensor core instruction here may leave its left operand in
    registers while the next step writes there, as Triton has it do from 64 rows of that on: BLOCK_R is less.
    """
    lane = tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    wide_cols = wide + cols.to(tl.int64)[None, :] * stride_wide_n
    for first in range(start, end, BLOCK_M):
        row = first + lane
        inside = row < end
        slot = row
        if BY_TOKEN or DROP or weights is not None:
            slot = tl.load(order + row, mask=inside, other=0)
        source = row
        if BY_TOKEN:
            source = slot // TOP_K
        y = tl.load(wide_cols + source.to(tl.int64)[:, None] * stride_wide_m, mask=inside[:, None], other=0.0)
        if DROP:
            y = tl.where(_kept(slot, cols, seed, N, DROP, STREAM), y, 0.0)
        x = tl.load(thin + row.to(tl.int64)[:, None] * R + r[None, :], mask=inside[:, None], other=0.0)
        if weights is not None:
            weight = tl.load(weights + slot // TOP_K * stride_wt + slot % TOP_K * stride_wj, mask=inside, other=0.0)
            x = (x.to(tl.float32) * weight.to(tl.float32)[:, None]).to(x.dtype)
        acc = tl.dot(x.T, y, acc, input_precision="ieee")
    return acc


@triton.jit
def factor_grads_kernel(
    # pointers
    x, grad, low_rank, grad_low_rank, order, offsets, weights, seed, grad_A, grad_B,
    # sizes
    K: tl.constexpr, N: tl.constexpr, RANK: tl.constexpr, HALVES: tl.constexpr, TOP_K: tl.constexpr,
    # strides
    stride_xm, stride_xk, stride_gm, stride_gn, stride_wt, stride_wj,
    # meta
    X_BY_TOKEN: tl.constexpr, GRAD_BY_TOKEN: tl.constexpr, DROP: tl.constexpr, STREAM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of A's gradient and of B's, E): one expert's block of BLOCK_R by BLOCK_N.

    x (M, K), grad (M, N), each by token if so said; low_rank and grad_low_rank (M, R); offsets (E+1,); weights (T, k)
    of the rows of ``grad``, or None if they are in it. grad_A (E, R, K) and grad_B (E, N, RANK), each may be None.
    """
    R: tl.constexpr = RANK * HALVES
    block = tl.program_id(0)
    expert = tl.program_id(1)
    start = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    if grad_A is not None:
        columns: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
        blocks: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R * columns
        if block < blocks:
            r = block // columns * BLOCK_R + tl.arange(0, BLOCK_R)
            k = block % columns * BLOCK_N + tl.arange(0, BLOCK_N)
            acc = _reduce(
                grad_low_rank, x, order, None, seed, clamp(r, R, BLOCK_R), clamp(k, K, BLOCK_N), start, end,
                R, K, TOP_K, stride_xm, stride_xk, 0, 0, X_BY_TOKEN, DROP, STREAM, BLOCK_M, BLOCK_R, BLOCK_N,
            )  # fmt: skip
            acc *= 1.0 / (1.0 - DROP / 4294967296.0)
            at = grad_A + expert.to(tl.int64) * (R * K) + r[:, None] * K + k[None, :]
            tl.store(at, acc.to(grad_A.dtype.element_ty), mask=(r < R)[:, None] & (k < K)[None, :])
            return
        block -= blocks
    if grad_B is not None:
        half_n: tl.constexpr = N // HALVES
        half_columns: tl.constexpr = (half_n + BLOCK_N - 1) // BLOCK_N
        half = block % (half_columns * HALVES) // half_columns
        r = block // (half_columns * HALVES) * BLOCK_R + tl.arange(0, BLOCK_R)
        n = block % half_columns * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = _reduce(
            low_rank, grad, order, weights, seed, half * RANK + clamp(r, RANK, BLOCK_R),
            half * half_n + clamp(n, half_n, BLOCK_N), start, end,
            R, N, TOP_K, stride_gm, stride_gn, stride_wt, stride_wj, GRAD_BY_TOKEN, 0, 0, BLOCK_M, BLOCK_R, BLOCK_N,
        )  # fmt: skip
        at = grad_B + expert.to(tl.int64) * (N * RANK) + (half * half_n + n)[None, :] * RANK + r[:, None]
        tl.store(at, acc.to(grad_B.dtype.element_ty), mask=(r < RANK)[:, None] & (n < half_n)[None, :])


@triton.jit
def repack_kernel(
    # pointers
    factor, out,
    # sizes
    E: tl.constexpr, N: tl.constexpr, RANK: tl.constexpr,
    # strides
    stride_e, stride_n, stride_r,
    # meta
    BLOCK: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(N * RANK, BLOCK), cdiv(E, BLOCK_E)): BLOCK elements of BLOCK_E experts of factor, out (E, N, RANK)."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E).to(tl.int64)
    inside = (at < N * RANK)[:, None] & (e < E)[None, :]
    element = (at // RANK).to(tl.int64) * stride_n + (at % RANK).to(tl.int64) * stride_r
    x = tl.load(factor + element[:, None] + e[None, :] * stride_e, mask=inside)
    tl.store(out + e[None, :] * (N * RANK) + at[:, None], x.to(out.dtype.element_ty), mask=inside)
