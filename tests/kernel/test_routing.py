"""routing: what its four tensors say, worked out again in plain Python."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from .absent import module
from .problems import BALANCES, SKIPPING, Problem, lay_out
from .tables import assert_table_holds


@pytest.mark.kernels_ci
@pytest.mark.parametrize("imbalance", BALANCES + SKIPPING)
@pytest.mark.parametrize("block_m", [16, 128])
def test_the_table_sorts_every_slot_and_covers_every_row_once(kernel, device, imbalance, block_m):
    index = Problem(T=300, k=3, E=6, imbalance=imbalance).draw_index(device)
    assert_table_holds(kernel.routing(index, 6, block_m), index, 6, block_m)


@settings(max_examples=150)
@given(
    ids=st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), max_size=60),
    experts=st.integers(5, 8),
    block_m=st.sampled_from([16, 32, 64]),
    dtype=st.sampled_from([torch.int32, torch.int64]),
    layout=st.sampled_from(["contiguous", "transposed", "padded", "expanded"]),
)
def test_the_table_holds_for_any_ids(kernel, ids, experts, block_m, dtype, layout):
    index = lay_out(torch.tensor(ids, dtype=dtype).reshape(-1, 3), layout)
    assert_table_holds(kernel.routing(index, experts, block_m), index, experts, block_m)


def test_no_tokens_give_an_empty_table(kernel, device):
    index = torch.empty(0, 8, dtype=torch.int64, device=device)
    assert_table_holds(kernel.routing(index, 4), index, 4, 128)


def test_the_default_tile_has_128_rows(kernel, device):
    index = Problem(T=300).draw_index(device)
    for default, explicit in zip(kernel.routing(index, 4), kernel.routing(index, 4, 128)):
        assert torch.equal(default, explicit)


def test_shapes_and_dtypes_depend_on_sizes_alone(kernel, device):
    layouts = set()
    for imbalance in BALANCES + SKIPPING:
        index = Problem(T=50, imbalance=imbalance).draw_index(device)
        layouts.add(tuple((t.shape, t.dtype, t.stride(), t.device.type) for t in kernel.routing(index, 4, 16)))
    assert len(layouts) == 1


@pytest.mark.parametrize(
    ("slots", "experts", "launches"),
    [(8192, 8, 1), (8194, 8, 2), (8192, 128, 1), (8194, 128, 2), (2048, 512, 1), (2050, 512, 2), (512, 4096, 2)],
)
def test_many_readings_take_two_launches(kernel, compiler, slots, experts, launches):
    module(kernel, "routing").routing(torch.zeros(slots // 2, 2, dtype=torch.int64), experts, 128)
    assert compiler.compiled == [["_routing_kernel"], ["_count_kernel", "_place_kernel"]][launches - 1]


def test_experts_whose_counts_would_take_a_program_s_memory_take_one(kernel, compiler):
    module(kernel, "routing").routing(torch.zeros(4096, 2, dtype=torch.int64), 4097, 128)
    assert compiler.compiled == ["_routing_kernel"]
