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

from ..projection import Lora, Projection
from ..tiling import Narrow, cdiv, choose_narrow
from .launch import launch
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


def addition_operand(addition: Optional[Addition]) -> Tuple[Optional[AdditionPointers], Optional[Tuple]]:
    """``addition`` and LORA as a projection's kernel takes them: rank, halves, columns a step, dropout, its stream."""
    if addition is None:
        return None, None
    low_rank, factor, seed, dropout, stream = addition
    step = min(64, max(16, triton.next_power_of_2(factor.rank * factor.halves)))
    meta = (factor.rank, factor.halves, step, _bound(dropout), stream)
    return AdditionPointers(*factor.pointers, low_rank, seed), meta


@triton.jit
def _low_rank_kernel(
    # pointers
    a, factor, order, tiles, seed, out,
    # sizes
    scale, N: tl.constexpr, RANK: tl.constexpr, HALVES: tl.constexpr, TOP_K: tl.constexpr,
    # strides
    stride_am, stride_an,
    # meta
    BY_TOKEN: tl.constexpr, DROP: tl.constexpr, STREAM: tl.constexpr,
    BLOCK_M: tl.constexpr, ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (tiles * BLOCK_M // ROWS * cdiv(R, BLOCK_R),): ROWS rows of a tile, BLOCK_R columns.

    a (M, N), or (T, N) if BY_TOKEN; factor (E, N, R), out (M, R), order (M,).
    """
    R: tl.constexpr = RANK * HALVES
    blocks: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    pieces: tl.constexpr = BLOCK_M // ROWS * blocks
    tile = tiles + tl.program_id(0) // pieces * 3
    expert = tl.load(tile)
    if expert < 0:
        return
    first = tl.load(tile + 1) + tl.program_id(0) % pieces // blocks * ROWS
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
def _factor_grads_kernel(
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


class Adapter(NamedTuple):
    """The adapter of one projection during a call, and how the call has sorted its rows."""

    lora: Lora
    stream: int
    seed: Optional[Tensor]
    top_k: int
    order: Tensor
    tiles: Tensor
    block_m: int
    narrow: Narrow

    def forward_addition(self, x: Tensor, by_token: bool = False) -> Addition:
        """What the projection of x (M, K), or (T, K) by token, gets added."""
        return Addition(self._low_rank(x, self._factor_a(), by_token, self.lora.dropout), self._factor_b())

    def backward_addition(self, grad: Tensor, by_token: bool = False) -> Addition:
        """What the gradient of the projection's input gets added, from that of its result (M, N)."""
        low_rank = self._low_rank(grad, self._factor_b(), by_token)
        return Addition(low_rank, self._factor_a(), self.seed, self.lora.dropout, self.stream)

    def factor_grads(
        self,
        x: Optional[Tensor],
        grad: Tensor,
        low_rank: Tensor,
        grad_low_rank: Tensor,
        offsets: Tensor,
        wanted: Tuple[bool, bool],
        x_by_token: bool = False,
        weights: Optional[Tensor] = None,
    ) -> Tuple[Tensor, Tensor]:
        """The gradients of A and B, of size 0 if not wanted.

        Args:
            x: the projection's input (M, K), or (T, K) by token; each row times its routing weight if ``weights`` are
                given; None if only B's is wanted.
            grad: the gradient of its result (M, N); if ``weights`` (T, k) are given (T, N), before they apply.
            low_rank, grad_low_rank: (M, R), of the two additions.
        """
        (A, B, *_), halves = self.lora, self.lora.halves
        grad_A, grad_B = (f.new_empty(f.shape) if asked else None for f, asked in zip((A, B), wanted))
        columns, k, n, rank = A.shape[1], A.shape[2], B.shape[1], B.shape[2]
        tile, rows = self.narrow.factor_grads.fit(columns, max(k, n)), self.narrow.grad_rows
        blocks_a = cdiv(columns, tile.block_n) * cdiv(k, tile.block_k) if wanted[0] else 0
        blocks_b = cdiv(rank, tile.block_n) * cdiv(n // halves, tile.block_k) * halves if wanted[1] else 0
        strides = (stride for t in (x, grad, weights) for stride in ((0, 0) if t is None else t.stride()))
        launch(
            _factor_grads_kernel, (blocks_a + blocks_b, A.shape[0]), tile.num_warps, tile.num_stages,
            x, grad, low_rank, grad_low_rank, self.order, offsets, weights, self.seed, grad_A, grad_B,
            k, n, rank, halves, self.top_k, *strides,
            x_by_token, weights is not None, _bound(self.lora.dropout), self.stream, rows, tile.block_n, tile.block_k,
        )  # fmt: skip
        return tuple(f.new_empty(0) if grad is None else grad for f, grad in ((A, grad_A), (B, grad_B)))

    def _low_rank(self, a: Tensor, factor: Factor, by_token: bool, dropout: float = 0.0) -> Tensor:
        """(M, R): scaling times rows of a times F."""
        pointers, n, rank, halves = factor
        columns = rank * halves
        out = a.new_empty(self.order.numel(), columns)
        tile, rows = self.narrow.low_rank.fit(columns, n), min(self.block_m, self.narrow.rows)
        grid = (self.tiles.shape[0] * (self.block_m // rows) * cdiv(columns, tile.block_n),)
        launch(
            _low_rank_kernel, grid, tile.num_warps, tile.num_stages,
            a, pointers, self.order, self.tiles, self.seed, out, self.lora.scaling / (1.0 - dropout),
            n, rank, halves, self.top_k, *a.stride(), by_token, _bound(dropout), self.stream,
            self.block_m, rows, tile.block_n, tile.block_k,
        )  # fmt: skip
        return out

    def _factor_a(self) -> Factor:
        _, columns, k = self.lora.A.shape
        stride_e, stride_r, stride_k = self.lora.A.stride()
        return Factor(FactorPointers(self.lora.A, stride_e, stride_k, stride_r), k, columns, 1)

    def _factor_b(self) -> Factor:
        """Stored with experts fastest, as in PEFT, no two elements of an expert share a sector of memory: a copy reads
        so once, each tile of rows would do it again."""
        B = self.lora.B
        if 1 not in B.stride()[1:]:
            B = B.contiguous()
        return Factor(FactorPointers(B, *B.stride()), *B.shape[1:], self.lora.halves)


def adapters(
    gate_up: Projection,
    down: Projection,
    dtype: torch.dtype,
    seed: Optional[Tensor],
    top_k: int,
    order: Tensor,
    tiles: Tensor,
    block_m: int,
) -> Tuple[Optional[Adapter], Optional[Adapter]]:
    """Those of both projections, each with a stream of its own for dropout."""
    found = []
    for stream, (weight, lora) in enumerate((gate_up, down)):
        if lora is not None:
            narrow = choose_narrow(
                order.numel(), weight.shape[0], lora.A.shape[1], lora.dropout > 0, dtype, order.device
            )
            lora = Adapter(lora, stream, seed, top_k, order, tiles, block_m, narrow)
        found.append(lora)
    return tuple(found)


def _bound(dropout: float) -> int:
    """Hashes below this drop their element."""
    return int(dropout * 2**32)
