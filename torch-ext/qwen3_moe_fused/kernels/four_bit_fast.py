"""The product with a 4-bit stack on NVIDIA cards from sm_80 on, decoded where the tensor cores read it.

Decoding costs as much as multiplying, so this file spends as few instructions on it as it can. The plain path in
``four_bit`` computes the same, to rounding, and holds it to account. What it does differently, and what that buys
(gate_up at 4096 tokens of Qwen3-30B-A3B on an H200):

1. The weight is the left operand, out^T = w x^T: of the two only the left may lie in registers, so a decoded weight
   never goes through shared memory (17 %).
2. ``nibbles`` looks eight weights up in 21 instructions: 2.5 times faster than selects.
3. Packed bytes are decoded in place. In a 16 x 16 operand a thread of the tensor cores holds columns 2c, 2c + 1,
   2c + 8 and 2c + 9; the packed row gives it eight neighbours. The order of a sum is free, so the columns of x are
   permuted instead, and the weights stay where they are (15 to 28 %). With few rows, x is permuted as it is loaded;
   with more, a copy of it once before, and gate_up writes what down reads in that order (another 17 to 24 % on an
   H100).
4. Backward needs w^T, whose packed dimension is the output. Nibbles of rows n and n + 1 are paired, looked up together
   and come out as the pair along n that the operand wants; the permutation is then one of the output's columns.
5. ``absmax`` is prepared once a call by ``fast_weights``: decoded, divided by the codebook's FACTOR and rounded to 16
   bit, so that a pair of weights takes one multiplication. A scale of two numbers, high + low, would take two.

On Hopper a product goes on while its threads do, and must have read its registers before the next weights come in
their place; Triton forgets to wait (triton-lang/triton#9433). ``_settle`` waits as soon as the product is on its way.
In backward's tiles of 128 columns the assembly waits, between looking weights up and writing them (6 to 8 % of backward
at 2048 to 8192 tokens). Elsewhere that would gain up to 1 %, or lose up to 6: nvidia-h200/waits.txt.

To the compiler all assembly that decodes is a pure function, or it would not move changes of layout above it. That a
wait among it stays behind the product before follows from its inputs, which are loaded after that has been issued;
benchmarks/compile_report.py looks for writes that come too early in what Triton makes of it.
"""

import functools
from typing import List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

from ..projection import FourBitWeight, Weight
from ..tiling import Tile, cdiv, next_power_of_2
from .four_bit import FourBitPointers, absmax_of
from .launch import launch
from .nibbles import FACTORS, decode_row, decode_two_rows, even_words

Tensor = torch.Tensor

SCALED_BLOCK = 64  # weights per prepared scale, whatever the stack's own blocksize


class FastPointers(NamedTuple):
    """What a kernel takes: packed uint8, read in words of 32 or 16 bits; table int32, the even words of
    ``nibbles.table_words``, (4, 64) with a copy for each lane; scales (E, K / 64, N), 16-bit numbers' bits."""

    packed: Tensor
    table: Tensor
    scales: Tensor


@triton.jit
def _table(table, word: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """A word of the table as a tensor. Loaded lane by lane although all are equal: a splat would be a uniform register,
    copied at each use, and would keep Triton from moving layout conversions above the decode."""
    return tl.load(table + word * 64 + tl.arange(0, C))[None, :].broadcast_to(R, C)


@triton.jit
def _pairs(word):
    """int32 {low, high} -> (..., 2) 16-bit numbers' bits."""
    return tl.join((word & 0xFFFF).to(tl.uint16), ((word >> 16) & 0xFFFF).to(tl.uint16))


@triton.jit
def _settle(step):
    """Waits for the product in flight, see the module."""
    if cuda_capability_geq(9, 0):
        if not cuda_capability_geq(10, 0):
            tl.inline_asm_elementwise(
                "{\nwgmma.wait_group.sync.aligned 0;\nmov.b32 $0, $1;\n}", "=r,r", [step],
                dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip


@triton.jit
def column_at(p):
    """The column of x that ``permute_columns`` puts at place p."""
    k = (p & 1) | (p >> 3 & 1) << 1 | (p >> 4 & 1) << 2 | (p >> 5 & 1) << 3 | (p >> 1 & 3) << 4 | p // 64 * 64
    return tl.max_contiguous(tl.multiple_of(k, [2]), [2])


@triton.jit
def permute_columns(x):
    """x (R, C) with each 64 columns reordered: what the eight bytes of a thread stand for lies where the tensor cores
    want that thread's columns 2c, 2c + 1, 2c + 8, 2c + 9 of four times 16."""
    split = tl.reshape(x, (x.shape[0], x.shape[1] // 64, 4, 2, 2, 2, 2))
    return tl.reshape(tl.permute(split, (0, 1, 3, 4, 5, 2, 6)), (x.shape[0], x.shape[1]))


@triton.jit
def accumulate_rows(
    # pointers
    a, w,
    # where
    rows, cols, expert,
    # sizes
    N: tl.constexpr, K: tl.constexpr,
    # strides
    stride_am, stride_ak,
    # meta
    BLOCK_M: tl.constexpr, COLS: tl.constexpr, BLOCK_K: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """``product.accumulate`` for a packed (E, N, K). K is a multiple of BLOCK_K, BLOCK_K of 64.

    FORMAT is ("fast", assembly, 32, whether a's columns lie permuted already, _).
    """
    WORDS: tl.constexpr = BLOCK_K // 8
    RUNS: tl.constexpr = BLOCK_K // 64
    t0, t1 = _table(w.table, 0, COLS, WORDS), _table(w.table, 1, COLS, WORDS)
    t2, t3 = _table(w.table, 2, COLS, WORDS), _table(w.table, 3, COLS, WORDS)
    place = tl.arange(0, BLOCK_K) if FORMAT[3] else column_at(tl.arange(0, BLOCK_K))
    a_tile = a + rows.to(tl.int64)[:, None] * stride_am + place[None, :] * stride_ak
    row = expert.to(tl.int64) * N + cols
    words = w.packed.to(tl.pointer_type(tl.int32), bitcast=True)
    q_tile = words + row[:, None] * (K // 8) + tl.arange(0, WORDS)[None, :]
    pairs = w.scales.to(tl.pointer_type(tl.int32), bitcast=True)  # of neighbours: what is copied ahead has 4 bytes
    s_tile = pairs + (expert.to(tl.int64) * (K // 64) + tl.arange(0, RUNS))[None, :] * (N // 2) + cols[:, None] // 2
    half = cols[:, None] % 2 * 16
    acc = tl.zeros((COLS, BLOCK_M), tl.float32)
    for first in range(0, K, BLOCK_K):
        x = tl.load(a_tile)
        q = tl.load(q_tile)
        s = tl.load(s_tile) >> half
        scales = _spread((s & 0xFFFF) | (s << 16), COLS, RUNS, WORDS)
        w0, w1, w2, w3 = tl.inline_asm_elementwise(
            FORMAT[1], "=&r,=&r,=&r,=&r,r,r,r,r,r,r", [q, scales, t0, t1, t2, t3],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
        y = _pairs(tl.join(tl.join(w0, w2), tl.join(w1, w3)))
        y = permute_columns(tl.reshape(y, (COLS, BLOCK_K))).to(a.dtype.element_ty, bitcast=True)
        acc = tl.dot(y, x.T, acc)
        _settle(first)
        a_tile += BLOCK_K * stride_ak
        q_tile += WORDS
        s_tile += RUNS * (N // 2)
    return acc.T


@triton.jit
def accumulate_columns(
    # pointers
    a, w,
    # where
    rows, expert, col,
    # sizes
    N: tl.constexpr, K: tl.constexpr,
    # strides
    stride_am, stride_ak,
    # meta
    BLOCK_M: tl.constexpr, COLS: tl.constexpr, BLOCK_K: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """``product.accumulate`` for the transpose of a packed (E, K, N). N is a multiple of COLS, K of BLOCK_K.

    FORMAT is ("fast", assembly, bits of a word, _, whether the assembly waits for the product in flight). A thread's
    rows of the left operand are pairs 8 apart, as many pairs as all warps together need turns to cover COLS; a word has
    as many nibbles as the thread has rows.
    """
    BITS: tl.constexpr = FORMAT[2]
    NIBBLES: tl.constexpr = BITS // 4
    WORDS: tl.constexpr = COLS // NIBBLES
    RUNS: tl.constexpr = COLS // 64
    t0, t1 = _table(w.table, 0, BLOCK_K // 2, WORDS), _table(w.table, 1, BLOCK_K // 2, WORDS)
    t2, t3 = _table(w.table, 2, BLOCK_K // 2, WORDS), _table(w.table, 3, BLOCK_K // 2, WORDS)
    k = tl.arange(0, BLOCK_K)
    a_tile = a + rows.to(tl.int64)[:, None] * stride_am + k[None, :] * stride_ak
    words = w.packed.to(tl.pointer_type(tl.int32 if BITS == 32 else tl.int16), bitcast=True)
    q_tile = words + (expert.to(tl.int64) * K + k)[:, None] * (N // NIBBLES) + col // NIBBLES
    q_tile += tl.arange(0, WORDS)[None, :]
    pairs = w.scales.to(tl.pointer_type(tl.int32), bitcast=True)
    s_tile = pairs + (expert.to(tl.int64) * (N // 64) + col // 64 + tl.arange(0, RUNS))[None, :] * (K // 2)
    s_tile += tl.arange(0, BLOCK_K // 2)[:, None]
    acc = tl.zeros((COLS, BLOCK_M), tl.float32)
    for first in range(0, K, BLOCK_K):
        x = tl.load(a_tile)
        q0, q1 = _even_odd(tl.load(q_tile), BLOCK_K, WORDS)
        scales = _spread(tl.load(s_tile), BLOCK_K // 2, RUNS, WORDS)
        if BITS == 32:
            w0, w1, w2, w3, w4, w5, w6, w7 = tl.inline_asm_elementwise(
                FORMAT[1], "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r,r,r", [q0, q1, scales, t0, t1, t2, t3],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32),
                is_pure=True, pack=1,
            )  # fmt: skip
            even, odd = tl.join(tl.join(w0, w4), tl.join(w2, w6)), tl.join(tl.join(w1, w5), tl.join(w3, w7))
            y = tl.reshape(_pairs(tl.join(even, odd)), (BLOCK_K // 2, WORDS // 8, 8, 2, 2, 2, 2))
            y = tl.permute(y, (3, 4, 1, 5, 2, 0, 6))
        else:
            w0, w1, w2, w3 = tl.inline_asm_elementwise(
                FORMAT[1], "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r",
                [q0.to(tl.int32), q1.to(tl.int32), scales, t0, t1, t2, t3],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
            )  # fmt: skip
            y = tl.reshape(_pairs(tl.join(tl.join(w0, w2), tl.join(w1, w3))), (BLOCK_K // 2, WORDS // 8, 8, 2, 2, 2))
            y = tl.permute(y, (3, 1, 4, 2, 0, 5))
        acc = tl.dot(tl.reshape(y, (COLS, BLOCK_K)).to(a.dtype.element_ty, bitcast=True), x.T, acc)
        if not FORMAT[4]:
            _settle(first)
        a_tile += BLOCK_K * stride_ak
        q_tile += BLOCK_K * (N // NIBBLES)
        s_tile += BLOCK_K // 2
    if BITS == 32:  # rows of acc back to columns in order
        out = tl.permute(tl.reshape(acc, (2, 2, WORDS // 8, 2, 8, BLOCK_M)), (5, 2, 4, 0, 1, 3))
    else:
        out = tl.permute(tl.reshape(acc, (2, WORDS // 8, 2, 8, BLOCK_M)), (4, 1, 3, 0, 2))
    return tl.reshape(out, (BLOCK_M, COLS))


@triton.jit
def _even_odd(x, R: tl.constexpr, C: tl.constexpr):
    """Rows 0, 2, .. and 1, 3, .. of x (R, C)."""
    return tl.split(tl.permute(tl.reshape(x, (R // 2, 2, C)), (0, 2, 1)))


@triton.jit
def _spread(x, R: tl.constexpr, RUNS: tl.constexpr, C: tl.constexpr):
    """Each column of x (R, RUNS) as C / RUNS columns side by side."""
    return tl.reshape(x[:, :, None].broadcast_to(R, RUNS, C // RUNS), (R, C))


@triton.jit(do_not_specialize=["rows"])
def _permute_kernel(x, out, rows, K: tl.constexpr, stride_xm, stride_xk, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Grid (cdiv(rows, BLOCK_M), K / BLOCK_K): out (rows, K), x (rows, K) with its columns permuted."""
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    value = tl.load(x + row.to(tl.int64) * stride_xm + k * stride_xk, mask=row < rows, other=0.0)
    tl.store(out + row.to(tl.int64) * K + k, permute_columns(value), mask=row < rows)


def permuted(x: Tensor) -> Tensor:
    """x (rows, K) with its columns as ``permute_columns`` orders them; K is a multiple of 64."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        grid = (cdiv(x.shape[0], 8), x.shape[1] // 64)
        launch(_permute_kernel, grid, 1, 1, (x, out), x.shape[:1], x.shape[1], *x.stride(), 8, 64)
    return out


@triton.jit
def _pack_stack(w, table, scales, m_sizes, STACK: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr):
    """STACK holds N, K, FACTOR, blocksize, nested blocksize, the least power of two of at least K / 64, table words."""
    N: tl.constexpr = STACK[0]
    K: tl.constexpr = STACK[1]
    expert = tl.program_id(1)
    if (tl.program_id(0) == 0) & (expert == 0):
        for i in tl.static_range(4):
            tl.store(table + i * 64 + tl.arange(0, 64), tl.full((64,), STACK[6 + i], tl.int32))
    if tl.load(m_sizes + expert) > 0:
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
        run = tl.arange(0, STACK[5])[None, :]
        inside = (row < N) & (run < K // 64)
        row = tl.minimum(row, N - 1)
        run = tl.minimum(run, K // 64 - 1)
        scale = absmax_of(w, ((expert.to(tl.int64) * N + row) * K + run * 64) // STACK[3], STACK[4])
        scale /= STACK[2]
        dtype: tl.constexpr = tl.bfloat16 if DTYPE == "bf16" else tl.float16
        bits = scale.to(dtype).to(tl.int16, bitcast=True)
        tl.store(scales + (expert.to(tl.int64) * (K // 64) + run) * N + row, bits, mask=inside)


@triton.jit
def _pack_scales_kernel(
    # pointers
    w0, table0, scales0, w1, table1, scales1, m_sizes,
    # meta
    STACKS: tl.constexpr, STACK0: tl.constexpr, STACK1: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(N, ROWS), E, STACKS): fills ``table`` and ``scales`` of ``FastPointers`` for one stack or for two.

    A scale is absmax / FACTOR. Experts without rows are left out.
    """
    if tl.program_id(2) == 0:
        _pack_stack(w0, table0, scales0, m_sizes, STACK0, DTYPE, ROWS)
    elif STACKS == 2:
        _pack_stack(w1, table1, scales1, m_sizes, STACK1, DTYPE, ROWS)


class FastWeight(NamedTuple):
    """A stack (E, N, K) ready for ``accumulate_rows`` and ``accumulate_columns``; only the experts that have rows."""

    packed: Tensor
    table: Tensor
    scales: Tensor
    shape: Tuple[int, int, int]
    quant_type: str
    dtype: str
    permuted: bool

    def operand(self, tile: Tile, transposed: bool) -> Tuple[FastPointers, Tuple[str, str, int, bool, bool]]:
        """What a kernel takes as its weight and as FORMAT."""
        bits, wait = 32, False
        decode = decode_row(self.quant_type, self.dtype)
        if transposed:
            bits = tile.block_n // (2 * tile.num_warps)
            wait = bits == 16 and _is_hopper(self.packed.device)  # tiles of 128 columns by 4 warps
            decode = decode_two_rows(self.quant_type, self.dtype, bits, wait)
        return FastPointers(self.packed, self.table, self.scales), ("fast", decode, bits, self.permuted, wait)


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def fast_weights(
    weights: Sequence[Optional[Weight]], m_sizes: Tensor, dtype: torch.dtype, permuted: bool = False
) -> List[Union[Tensor, FastWeight, None]]:
    """Prepares the scales of one or two stacks in one launch, for the experts that have rows; others stay as they are.

    Blocks must not straddle 64 weights: blocksize and K are multiples of 64. ``permuted`` says that what the stacks
    multiply comes with its columns permuted.
    """
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    prepared, pointers, stacks = [], [], []
    for weight in weights:
        if isinstance(weight, FourBitWeight):
            experts, n, k = weight.shape
            runs = k // SCALED_BLOCK
            table, scales = m_sizes.new_empty(4 * 64), m_sizes.new_empty(experts * runs * n, dtype=torch.int16)
            pointers += [FourBitPointers(*weight[:6]), table, scales]
            stack = (n, k, FACTORS[weight.quant_type], weight.blocksize, weight.nested_blocksize, next_power_of_2(runs))
            stacks.append((*stack, *even_words(weight.quant_type, name)))
            weight = FastWeight(weight.packed, table, scales, weight.shape, weight.quant_type, name, permuted)
        prepared.append(weight)
    if stacks:
        rows, count = 64, len(stacks)
        grid = (cdiv(max([stack[0] for stack in stacks]), rows), m_sizes.shape[0], count)
        if count == 1:
            pointers, stacks = [*pointers, None, None, None], [*stacks, None]
        launch(_pack_scales_kernel, grid, 4, 1, (*pointers, m_sizes), (), count, *stacks, name, rows)
    return prepared
