"""Routing: a stable counting sort of the slots by expert, and the tile table.

Few slots take one launch, a program per expert. Each reads all S ids twice: once to count the slots before and of its
own expert, once to write them down. It needs nothing from its neighbours, so there is no second launch; the ids stay
in L2, so that the E readings cost less than a launch, as long as they are few.

Many slots take two launches, in which every id is read once: cut into chunks, a program each, they are counted by
expert first. Then each program adds up the counts of all chunks, which tell where an expert's rows start, and of those
before its own, which tell at which of them it goes on.

Either way there are no atomics, and no order that could change between runs.

The table needs no neighbours either: tiles of expert e start at entry ``offsets[e] // block_m + e``. Since
``ceil(n / b) <= (o + n) // b - o // b + 1``, the runs of entries never overlap, and at most one entry stays
unused between two of them.
"""

from typing import Tuple

import torch
import triton
import triton.language as tl

from ..tiling import cdiv, next_power_of_2
from .launch import launch

Tensor = torch.Tensor

MANY_READINGS = 2**20
"""Readings, of S slots by each expert or by 128 of fewer, above which two launches take less time than one. On an H200,
us in a graph, 128 experts: 9.4 and 9.3 for 8192 slots, 14.5 and 9.3 for 16384, 308 and 70 for 524288, with a few more
chunks (benchmarks/results/nvidia-h200/routing.txt)."""

MOST_EXPERTS = 4096
"""Experts up to which there may be two launches: a program counts all of them, in registers and 4 bytes each of shared
memory, which 32768 would exhaust on a consumer card."""

CHUNKS, BLOCK = 256, 128
"""Most chunks, and how many of a chunk's ids are placed at a time."""

COUNTS = 2**14
"""How many of the chunks' counts, a row each, are in registers at a time."""


@triton.jit
def _write_tiles(tiles, label, index, start, end, capacity, last, block_m):
    """The run of entries of expert ``index``: (label, first row, end), then -1 up to the next run or the end."""
    entry = start // block_m + index
    count = (end - start + block_m - 1) // block_m
    stop = tl.where(last, capacity, end // block_m + index + 1)
    step = tl.arange(0, 128)
    for i in range(0, stop - entry, 128):
        at = entry + i + step
        inside = at < stop
        used = (i + step < count) & (label >= 0)
        tl.store(tiles + at * 3, tl.where(used, label, -1), mask=inside)
        tl.store(tiles + at * 3 + 1, tl.where(used, start + (i + step) * block_m, -1), mask=inside)
        tl.store(tiles + at * 3 + 2, tl.where(used, end, -1), mask=inside)


@triton.jit
def _load_experts(ids, at, stop, E: tl.constexpr):
    """The experts of slots ``at``; ids that are none of [0, E) count as E, slots from ``stop`` on as E + 1."""
    expert = tl.load(ids + at, mask=at < stop, other=E)
    expert = tl.where((expert < 0) | (expert > E), E, expert)
    return tl.where(at < stop, expert.to(tl.int32), E + 1)


@triton.jit(do_not_specialize=["slots", "segment", "capacity", "block_m"])
def _routing_kernel(
    # pointers
    ids, order, m_sizes, offsets, tiles,
    # sizes
    slots, segment, capacity, block_m, E: tl.constexpr,
    # meta
    LANES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Grid (E+1,): one expert; the last takes the slots to skip. ids (S,), order (S,), tiles (capacity, 3).

    Lane i walks the slots [i * segment, (i + 1) * segment), STEP at a time, so that one prefix sum over the lanes,
    between the two readings, tells each where its rows start.
    """
    expert = tl.program_id(0)
    lane = tl.arange(0, LANES)
    step = tl.arange(0, STEP)
    at = lane[:, None] * segment + step[None, :]
    stop = tl.minimum((lane + 1) * segment, slots)[:, None]
    before = tl.zeros((LANES, STEP), tl.int32)
    mine = tl.zeros((LANES, STEP), tl.int32)
    for i in range(0, segment, STEP):
        found = _load_experts(ids, at + i, stop, E)
        before += (found < expert).to(tl.int32)
        mine += (found == expert).to(tl.int32)
    counts = tl.sum(mine, 1)
    start = tl.sum(tl.sum(before, 1), 0)
    count = tl.sum(counts, 0)

    tl.store(offsets + expert, start)
    if expert < E:
        tl.store(m_sizes + expert, count)
    _write_tiles(tiles, tl.where(expert < E, expert, -1), expert, start, start + count, capacity, expert == E, block_m)

    row = start + tl.cumsum(counts, 0) - counts
    for i in range(0, segment, STEP):
        hit = (_load_experts(ids, at + i, stop, E) == expert).to(tl.int32)
        rank = tl.cumsum(hit, 1) - hit
        tl.store(order + row[:, None] + rank, at + i, mask=hit != 0)
        row += tl.sum(hit, 1)


@triton.jit(do_not_specialize=["slots", "chunk"])
def _count_kernel(
    # pointers
    ids, counts,
    # sizes
    slots, chunk, E: tl.constexpr,
    # meta
    BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (chunks,): counts (chunks, E), of how many of a chunk's ids (S,) each expert is."""
    first = tl.program_id(0) * chunk
    stop = tl.minimum(first + chunk, slots)
    bins = tl.arange(0, BINS)
    found = tl.zeros((BINS,), tl.int32)
    for at in range(first, stop, BLOCK):
        experts = _load_experts(ids, at + tl.arange(0, BLOCK), stop, E)
        found += tl.histogram(experts, BINS, mask=experts < E)
    tl.store(counts + tl.program_id(0) * E + bins, found, mask=bins < E)


@triton.jit(do_not_specialize=["slots", "chunk", "capacity", "block_m"])
def _place_kernel(
    # pointers
    ids, counts, order, m_sizes, offsets, tiles,
    # sizes
    slots, chunk, capacity, block_m, E: tl.constexpr,
    # meta
    ROWS: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (chunks,): writes the rows of a chunk's slots, and the tiles of every chunks-th expert.

    Within BLOCK slots, a slot's rank is how many of those before it are of the same expert.
    """
    program = tl.program_id(0)
    chunks = tl.num_programs(0)
    bins = tl.arange(0, BINS)
    sizes = tl.zeros((BINS,), tl.int32)
    earlier = tl.zeros((BINS,), tl.int32)
    for at in range(0, chunks, ROWS):
        row = at + tl.arange(0, ROWS)[:, None]
        table = tl.load(counts + row * E + bins[None, :], mask=(row < chunks) & (bins < E)[None, :], other=0)
        sizes += tl.sum(table, 0)
        earlier += tl.sum(tl.where(row < program, table, 0), 0)
    ends = tl.cumsum(sizes, 0)
    starts = ends - sizes
    rows = tl.sum(sizes, 0)
    if program == 0:
        tl.store(m_sizes + bins, sizes, mask=bins < E)
        tl.store(offsets + bins, starts, mask=bins < E)
        tl.store(offsets + E, rows)
    for expert in range(program, E + 1, chunks):
        start = tl.where(expert < E, tl.sum(tl.where(bins == expert, starts, 0), 0), rows)
        end = tl.where(expert < E, tl.sum(tl.where(bins == expert, ends, 0), 0), slots)
        label = tl.where(expert < E, expert, -1)
        _write_tiles(tiles, label, expert, start, end, capacity, expert == E, block_m)

    first = program * chunk
    stop = tl.minimum(first + chunk, slots)
    step = tl.arange(0, BLOCK)
    place = starts + earlier
    skipped = rows + first - tl.sum(earlier, 0)
    for at in range(first, stop, BLOCK):
        experts = _load_experts(ids, at + step, stop, E)
        before = (experts[:, None] == experts[None, :]) & (step[:, None] > step[None, :])
        goes_on = tl.gather(place, tl.minimum(experts, BINS - 1), 0)
        goes_on = tl.where(experts < E, goes_on, skipped)
        tl.store(order + goes_on + tl.sum(before.to(tl.int32), 1), at + step, mask=at + step < stop)
        place += tl.histogram(experts, BINS, mask=experts < E)
        skipped += tl.sum((experts == E).to(tl.int32), 0)


@triton.jit(do_not_specialize=["rows", "capacity", "block_m"])
def _tile_table_kernel(
    # pointers
    m_sizes, offsets, tiles,
    # sizes
    rows, capacity, block_m, rest, E: tl.constexpr,
    # strides
    stride_m_sizes,
    # meta
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Grid (E+1,): one expert; the last takes the rows behind the last expert. m_sizes (E,), tiles (capacity, 3)."""
    expert = tl.program_id(0)
    lane = tl.arange(0, BLOCK_E)
    sizes = tl.load(m_sizes + lane * stride_m_sizes, mask=lane < E, other=0).to(tl.int64)
    sizes = tl.maximum(sizes, 0)
    start = tl.minimum(tl.sum(tl.where(lane < expert, sizes, 0), 0), rows).to(tl.int32)
    end = tl.minimum(tl.sum(tl.where(lane <= expert, sizes, 0), 0), rows).to(tl.int32)
    tl.store(offsets + expert, start)
    end = tl.where(expert < E, end, rows)
    _write_tiles(tiles, tl.where(expert < E, expert, rest), expert, start, end, capacity, expert == E, block_m)


def routing(top_k_index: Tensor, num_experts: int, block_m: int) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """order (S,), m_sizes (E,), offsets (E+1,), tiles (S // block_m + E + 1, 3), all int32."""
    slots = top_k_index.numel()
    shapes = slots, num_experts, num_experts + 1, (slots // block_m + num_experts + 1, 3)
    table = tuple(top_k_index.new_empty(shape, dtype=torch.int32) for shape in shapes)
    route(top_k_index, block_m, *table)
    return table


def route(top_k_index: Tensor, block_m: int, order: Tensor, m_sizes: Tensor, offsets: Tensor, tiles: Tensor) -> None:
    """Fills what :func:`routing` makes."""
    ids = top_k_index.contiguous()
    slots, num_experts, capacity = ids.numel(), m_sizes.shape[0], tiles.shape[0]
    if slots * max(num_experts, 128) <= MANY_READINGS or num_experts > MOST_EXPERTS:
        lanes, step = (128, 16) if slots <= 2048 else (512, 16)
        segment = cdiv(cdiv(slots, lanes), step) * step
        launch(
            _routing_kernel, (num_experts + 1,), lanes // 32, 1,
            (ids, order, m_sizes, offsets, tiles), (slots, segment, capacity, block_m), num_experts, lanes, step,
        )  # fmt: skip
    else:
        bins = next_power_of_2(num_experts)
        chunk = cdiv(cdiv(slots, CHUNKS), BLOCK) * BLOCK
        chunks = cdiv(slots, chunk)
        counts = m_sizes.new_empty(chunks, num_experts)
        launch(_count_kernel, (chunks,), 4, 1, (ids, counts), (slots, chunk), num_experts, bins, BLOCK)
        launch(
            _place_kernel, (chunks,), 4, 1,
            (ids, counts, order, m_sizes, offsets, tiles), (slots, chunk, capacity, block_m), num_experts,
            max(1, min(next_power_of_2(CHUNKS), COUNTS // bins)), bins, BLOCK,
        )  # fmt: skip


def tile_table(m_sizes: Tensor, rows: int, block_m: int, rest: int) -> Tuple[Tensor, Tensor]:
    """offsets (E+1,) and tiles (rows // block_m + E + 1, 3), int32; rows behind the last expert are labelled
    ``rest``, or belong to no tile if that is -1.

    Negative sizes count as zero, and offsets stop at ``rows``: a wrong ``m_sizes`` cannot lead out of bounds.
    """
    experts = m_sizes.numel()
    capacity = rows // block_m + experts + 1
    offsets = torch.empty(experts + 1, dtype=torch.int32, device=m_sizes.device)
    tiles = torch.empty(capacity, 3, dtype=torch.int32, device=m_sizes.device)
    launch(
        _tile_table_kernel, (experts + 1,), 4, 1,
        (m_sizes, offsets, tiles), (rows, capacity, block_m), rest, experts, m_sizes.stride(0),
        next_power_of_2(experts),
    )  # fmt: skip
    return offsets, tiles
