"""What backward needs of routing lies in one tensor, each part in its place."""

import importlib

import pytest
import torch


@pytest.fixture(scope="module")
def routed(kernel):
    return importlib.import_module(f"{kernel.__name__}.routed")


SIZES = [(6, 4, 16), (128, 128, 16), (35, 5, 128), (0, 3, 32)]  # slots, experts, rows per tile


@pytest.mark.parametrize("slots, experts, block_m", SIZES)
def test_all_parts_are_there_apart_and_aligned(routed, slots, experts, block_m):
    whole = routed.new_routed(torch.empty(slots, 1, dtype=torch.int64), experts, block_m).zero_()
    parts = *routed.order_of(whole, slots, experts), *routed.tiles_of(whole, slots, experts, block_m)
    assert [tuple(part.shape) for part in parts] == [
        (slots,), (experts,), (experts + 1,), (slots // block_m + experts + 1, 3),
    ]  # fmt: skip
    assert all((part.data_ptr() - whole.data_ptr()) % 16 == 0 and part.is_contiguous() for part in parts)
    for part in parts:
        part += 1
    assert whole.max() == 1 and whole.sum() == sum(part.numel() for part in parts)


@pytest.mark.parametrize("slots, experts, block_m", SIZES)
def test_without_tiles_the_others_are_the_same(routed, slots, experts, block_m):
    ids = torch.empty(slots, 1, dtype=torch.int64)
    whole = routed.new_routed(ids, experts, block_m)
    whole.copy_(torch.arange(whole.numel()))
    part = routed.sorted_part(whole, slots, experts)
    assert part.shape == routed.new_sorted(ids, experts).shape
    for a, b in zip(routed.order_of(part, slots, experts), routed.order_of(whole, slots, experts)):
        assert torch.equal(a, b)
    assert routed.tiles_of(part, slots, experts, block_m) == ()


def test_tiles_of_another_height_are_none(routed):
    whole = routed.new_routed(torch.empty(64, 1, dtype=torch.int64), 4, 16)
    assert routed.tiles_of(whole, 64, 4, 32) == ()
    of_few = routed.new_routed(torch.empty(8, 1, dtype=torch.int64), 4, 16)
    assert len(routed.tiles_of(of_few, 8, 4, 32)) == 2, "a tile holds all rows of an expert either way"
