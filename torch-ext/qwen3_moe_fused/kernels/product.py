"""The inner loop all grouped kernels share: rows of a times one expert's matrix, accumulated in fp32.

What a kernel does around this loop does not depend on how the matrix is stored. FORMAT says that: None for a dense
stack, described here; for a packed one ("plain", blocksize, nested blocksize), described in ``four_bit``, or
("fast", assembly, ..), in ``four_bit_fast``.

Rows are read through pointers, so they may lie anywhere (``rows`` holds their numbers) and a gather costs nothing
extra. Weights are read through pointers too or, where the card has a tensor memory accelerator, through a
descriptor: one thread then moves a whole tile, which frees the registers that addresses would take.

Rows and columns past the end are clamped, not masked: they repeat valid data, and the store leaves them out.
Only a ragged end of the summed dimension needs zeros.
"""

import functools
from typing import NamedTuple, Optional, Tuple, Union

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..projection import FourBitWeight
from ..tiling import Tile
from .four_bit import FourBitPointers, accumulate_four_bit
from .four_bit_fast import FastPointers, FastWeight, accumulate_columns, accumulate_rows

Tensor = torch.Tensor


@triton.jit
def clamp(cols, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """cols kept below N. Left alone where no block is ragged, so the compiler still sees that they are consecutive."""
    if N % BLOCK_N == 0:
        return cols
    else:
        return tl.minimum(cols, N - 1)


@triton.jit
def accumulate(
    # pointers
    a, w, w_desc,
    # where
    rows, cols, expert, col,
    # sizes
    N: tl.constexpr, K: tl.constexpr,
    # strides
    stride_am, stride_ak, stride_we, stride_wn, stride_wk,
    # meta
    BLOCK_M: tl.constexpr, COLS: tl.constexpr, BLOCK_K: tl.constexpr, W_ROWS: tl.constexpr, HALVES: tl.constexpr,
    FORMAT: tl.constexpr,
):  # fmt: skip
    """sum_k a[rows, k] * w[expert, cols, k] -> (BLOCK_M, COLS) fp32.

    rows (BLOCK_M,) and cols (COLS,) are valid numbers; cols is HALVES runs that start at ``col`` of each half of w's N
    rows. W_ROWS says whether w lies in memory as (E, N, K) or as (E, K, N).
    """
    if FORMAT is None:
        return _accumulate_dense(
            a, w, w_desc, rows, cols, expert, col, K, stride_am, stride_ak, stride_we, stride_wn, stride_wk,
            BLOCK_M, COLS, BLOCK_K, W_ROWS, HALVES,
        )  # fmt: skip
    elif FORMAT[0] == "plain":
        return accumulate_four_bit(
            a, w, rows, cols, expert, col, N, K, stride_am, stride_ak, BLOCK_M, COLS, BLOCK_K, W_ROWS, FORMAT,
        )  # fmt: skip
    elif W_ROWS:
        return accumulate_rows(a, w, rows, cols, expert, N, K, stride_am, stride_ak, BLOCK_M, COLS, BLOCK_K, FORMAT)
    else:
        return accumulate_columns(a, w, rows, expert, col, N, K, stride_am, stride_ak, BLOCK_M, COLS, BLOCK_K, FORMAT)


@triton.jit
def _accumulate_dense(
    a, w, w_desc, rows, cols, expert, col, K: tl.constexpr,
    stride_am, stride_ak, stride_we, stride_wn, stride_wk,
    BLOCK_M: tl.constexpr, COLS: tl.constexpr, BLOCK_K: tl.constexpr, W_ROWS: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    k = tl.arange(0, BLOCK_K)
    a_tile = a + rows.to(tl.int64)[:, None] * stride_am + k[None, :] * stride_ak
    w_tile = w + expert.to(tl.int64) * stride_we + cols.to(tl.int64)[None, :] * stride_wn + k[:, None] * stride_wk
    acc = tl.zeros((BLOCK_M, COLS), tl.float32)
    for first in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            x = tl.load(a_tile)
        else:
            x = tl.load(a_tile, mask=k[None, :] < K - first, other=0.0)
        if w_desc is None:
            if K % BLOCK_K == 0:
                y = tl.load(w_tile)
            else:
                y = tl.load(w_tile, mask=k[:, None] < K - first, other=0.0)
            w_tile += BLOCK_K * stride_wk
        elif W_ROWS:
            y = tl.reshape(w_desc.load([expert * HALVES, col, first]), (COLS, BLOCK_K)).T
        else:
            y = tl.reshape(w_desc.load([expert, first, col]), (BLOCK_K, COLS))
        acc = tl.dot(x, y, acc, input_precision="ieee")
        a_tile += BLOCK_K * stride_ak
    return acc


REACH = 2**31
"""Elements that an offset in 32 bits spans."""


def near(tensor: Tensor, columns: int) -> Tensor:
    """``tensor``, copied if ``columns`` steps along its last dimension lead beyond REACH: there kernels count in 32
    bits, from row to row and from expert to expert in 64."""
    return tensor.contiguous() if columns * tensor.stride(-1) >= REACH else tensor


class Operand(NamedTuple):
    """An expert weight (E, N, K) as the kernels take it. ``split`` gives half-empty tiles a path of half the height."""

    data: Union[Tensor, FourBitPointers, FastPointers]
    format: Optional[Tuple]
    descriptor: Optional[TensorDescriptor]
    strides: Tuple[int, int, int]
    w_rows: bool
    split: bool


Stored = Union[Tensor, FourBitWeight, FastWeight]


def operand(weight: Stored, block_m: int, tile: Tile, halves: int = 1, transposed: bool = False) -> Operand:
    """Chooses how a kernel reads ``weight`` (E, N, K), any strides, or its transpose. With two halves, N holds gate
    rows, then up rows."""
    if isinstance(weight, FourBitWeight):
        form = ("plain", weight.blocksize, weight.nested_blocksize)
        return Operand(FourBitPointers(*weight[:6]), form, None, (0, 0, 0), not transposed, False)
    if isinstance(weight, FastWeight):
        return Operand(*weight.operand(tile, transposed), None, (0, 0, 0), not transposed, block_m >= 64)
    return _dense_operand(weight.transpose(1, 2) if transposed else weight, block_m, tile, halves)


def _dense_operand(weight: Tensor, block_m: int, tile: Tile, halves: int) -> Operand:
    """A descriptor needs compute capability 9.0, one dimension of stride 1, the others multiples of 16 bytes, and an
    address that is one too. Anything else goes through pointers, and so do tiles of few rows: there the time is that
    of reading weights either way (measured on an H200), and a descriptor costs the host 50 us a launch.
    """
    w_rows = weight.stride(2) == 1 or weight.stride(1) != 1
    stored = weight if w_rows else weight.transpose(1, 2)
    descriptor = None
    if block_m >= 128 and _has_tma(weight.device) and _tma_can_read(stored) and (w_rows or halves == 1):
        experts, rows, cols = stored.shape
        block = [1, tile.block_n, tile.block_k] if w_rows else [1, tile.block_k, tile.block_n]
        shape, strides = [experts, rows, cols], list(stored.stride())
        if halves == 2:
            shape, strides[0], block[0] = [experts * 2, rows // 2, cols], rows // 2 * strides[1], 2
        if halves == 1 or stored.stride(0) == rows * stored.stride(1):
            descriptor = TensorDescriptor(stored, shape, strides, block)
    return Operand(weight, None, descriptor, weight.stride(), w_rows, block_m >= 128)


@functools.cache
def _has_tma(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def _tma_can_read(stored: Tensor) -> bool:
    step = 16 // stored.element_size()
    return (
        stored.numel() > 0
        and stored.stride(2) == 1
        and stored.stride(0) % step == 0
        and stored.stride(1) % step == 0
        and stored.stride(1) >= stored.shape[2]
        and stored.data_ptr() % 16 == 0
    )
