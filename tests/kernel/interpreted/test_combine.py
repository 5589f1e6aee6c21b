"""combine: each token's slots added up, in fp32 and in a fixed order."""

import pytest
import torch

from ..oracle import RATIO, assert_close
from ..poison import poisoned_memory
from ..problems import LAYOUTS, Problem, lay_out


def _expected(slots, weights, index, experts):
    wide = slots.double().view(*index.shape, slots.shape[1])
    kept = ((index >= 0) & (index < experts))[..., None]
    wide = wide if weights is None else wide * weights.double()[..., None]
    return torch.where(kept, wide, 0).sum(1)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("problem", [Problem(), Problem(imbalance="some_skipped"), Problem(T=1, k=4, H=1500)], ids=repr)
def test_the_weighted_sum_leaves_out_skipped_slots(launchers, problem, weighted, dtype):
    inputs = problem.draw("cpu", dtype)
    slots = inputs.hidden_states.repeat_interleave(problem.k, 0) + torch.arange(problem.k).repeat(problem.T)[:, None]
    slots = slots.to(dtype).masked_fill((inputs.top_k_index == problem.E).view(-1, 1), float("nan"))
    weights = inputs.top_k_weights if weighted else None
    with poisoned_memory("cpu"):
        out = launchers.combine(slots, weights, inputs.top_k_index, problem.E)
    assert out.dtype == dtype
    assert_close("combine", _expected(slots, weights, inputs.top_k_index, problem.E), out, RATIO[dtype])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_may_have_any_strides_and_a_wider_dtype(launchers, layout):
    inputs = Problem().draw("cpu", torch.float16, weights_dtype=torch.float32)
    slots = inputs.hidden_states.repeat_interleave(2, 0)
    weights = lay_out(inputs.top_k_weights, layout)
    out = launchers.combine(slots, weights, inputs.top_k_index, 4)
    assert_close("combine", _expected(slots, weights, inputs.top_k_index, 4), out, RATIO[torch.float16])


def test_terms_are_added_in_fp32_and_rounded_once(launchers):
    index = torch.arange(3)[None]
    slots = torch.tensor([[2048.0], [1.0], [-2048.0]], dtype=torch.float16)  # in fp16, 2048 + 1 is 2048
    assert launchers.combine(slots, None, index, 4).item() == 1.0
