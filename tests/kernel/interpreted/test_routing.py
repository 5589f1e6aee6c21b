"""The routing launchers: integers, so they must be right to the last one."""

import importlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ..poison import poisoned_memory
from ..problems import BALANCES, LAYOUTS, SKIPPING, Problem, lay_out
from ..tables import assert_table_holds, assert_tiles_cover

LAUNCHES = {  # readings above which there are two, most chunks, and how many of their counts are added up at once
    "one launch": (2**40, 256, 2**14),
    "two launches": (0, 256, 2**14),
    "two launches, few chunks": (0, 3, 2**14),
    "two launches, counts in turns": (0, 256, 16),
}


@pytest.fixture(scope="module", params=LAUNCHES.values(), ids=LAUNCHES, autouse=True)
def launches(request, kernel):
    """Few slots in the launches of many, and many in that of few."""
    routing = importlib.import_module(f"{kernel.__name__}.kernels.routing")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in zip(("MANY_READINGS", "CHUNKS", "COUNTS"), request.param, strict=True):
            patch.setattr(routing, name, value)
        yield


@pytest.mark.parametrize("imbalance", BALANCES + SKIPPING)
@pytest.mark.parametrize("problem", [Problem(T=37, k=3), Problem(T=0), Problem(T=700, k=3)], ids=repr)
def test_the_table_sorts_every_slot_and_covers_every_row_once(launchers, problem, imbalance):
    index = replace(problem, imbalance=imbalance).draw_index("cpu")
    with poisoned_memory("cpu"):
        table = launchers.routing(index, problem.E, 16)
    assert_table_holds(table, index, problem.E, 16)


@pytest.mark.parametrize("problem", [Problem(T=4500, imbalance="some_skipped"), Problem(T=1, E=128)], ids=repr)
def test_many_slots_and_many_experts(launchers, problem):
    index = problem.draw_index("cpu")
    with poisoned_memory("cpu"):
        table = launchers.routing(index, problem.E, 128)
    assert_table_holds(table, index, problem.E, 128)


@pytest.mark.parametrize("stray", [-1, 5, 2**31 - 1, -(2**31), 2**32, 2**32 + 1, -(2**32), 2**62])
def test_an_id_outside_the_experts_counts_as_one_to_skip(launchers, stray):
    index = torch.tensor([[0, 3], [stray, 1], [2, stray]])
    with poisoned_memory("cpu"):
        table = launchers.routing(index, 4, 16)
    assert_table_holds(table, index, 4, 16)


@settings(max_examples=25)
@given(
    ids=st.lists(st.lists(st.integers(-1, 6), min_size=2, max_size=2), max_size=40),
    experts=st.integers(1, 7),
    block_m=st.sampled_from([16, 64]),
    dtype=st.sampled_from([torch.int32, torch.int64]),
    layout=st.sampled_from(LAYOUTS),
)
def test_the_table_holds_for_any_ids(launchers, ids, experts, block_m, dtype, layout):
    index = lay_out(torch.tensor(ids, dtype=dtype).reshape(-1, 2), layout)
    with poisoned_memory("cpu"):
        table = launchers.routing(index, experts, block_m)
    assert_table_holds(table, index, experts, block_m)


@settings(max_examples=25)
@given(
    m_sizes=st.lists(st.integers(0, 70), min_size=1, max_size=6),
    extra=st.integers(0, 70),
    rest=st.booleans(),
    layout=st.sampled_from(["contiguous", "padded", "transposed"]),
)
def test_rows_behind_the_last_expert_have_tiles_only_if_they_have_a_label(launchers, m_sizes, extra, rest, layout):
    experts, rows = len(m_sizes), sum(m_sizes) + extra
    with poisoned_memory("cpu"):
        offsets, tiles = launchers.tile_table(lay_out(torch.tensor(m_sizes), layout), rows, 16, experts if rest else -1)
    bounds = [sum(m_sizes[:expert]) for expert in range(experts + 1)]
    runs = [*zip(range(experts), bounds, bounds[1:]), *([(experts, bounds[-1], rows)] if rest else [])]
    assert offsets.tolist() == bounds and tiles.shape == (rows // 16 + experts + 1, 3)
    assert_tiles_cover(tiles.tolist(), runs, 16)


@pytest.mark.parametrize(
    "m_sizes", [[20, 90, 10], [-5, 20, 90], [200, 0, -7], [2**31 - 1, 2**31 - 1, 5], [2**40, 1, 1]]
)
def test_sizes_that_do_not_fit_the_rows_never_lead_past_them(launchers, m_sizes):
    sizes = torch.tensor(m_sizes)
    sizes = sizes.int() if torch.equal(sizes.int(), sizes) else sizes
    with poisoned_memory("cpu"):
        offsets, tiles = launchers.tile_table(sizes, 100, 16, rest=3)
    bounds = [min(sum(max(size, 0) for size in m_sizes[:expert]), 100) for expert in range(4)]
    assert offsets.tolist() == bounds
    assert_tiles_cover(tiles.tolist(), [*zip(range(3), bounds, bounds[1:]), (3, bounds[-1], 100)], 16)


@settings(max_examples=25)
@given(sizes=st.lists(st.integers(0, 60), min_size=1, max_size=6), extra=st.integers(0, 40), rest=st.booleans())
def test_tile_tables_of_both_backends_are_equal(kernel, launchers, sizes, extra, rest):
    m_sizes, rows = torch.tensor(sizes, dtype=torch.int32), sum(sizes) + extra
    label = len(sizes) if rest else -1
    expected = kernel.reference.tile_table(m_sizes, rows, 16, label)
    for ours, theirs in zip(launchers.tile_table(m_sizes, rows, 16, label), expected):
        assert torch.equal(ours, theirs)
