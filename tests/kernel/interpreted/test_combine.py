"""combine and combine_backward: each token's slots added up, in fp32 and in a fixed order."""

import pytest
import torch

from ..oracle import RATIO, assert_close
from ..poison import poisoned_memory
from ..problems import LAYOUTS, Problem, lay_out

PROBLEMS = [Problem(), Problem(imbalance="some_skipped"), Problem(T=1, k=4, H=1500), Problem(k=3), Problem(T=0)]


def _slots(problem: Problem, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(T*k, H), NaN where a slot is skipped: nobody wrote it."""
    skipped = (index == problem.E).reshape(-1, 1)
    return torch.rand(problem.T * problem.k, problem.H).to(dtype).masked_fill(skipped, float("nan"))


def _combine(launchers, slots: torch.Tensor, weights: torch.Tensor, index: torch.Tensor, experts: int) -> torch.Tensor:
    out = slots.new_empty(index.shape[0], slots.shape[1])
    launchers.combine(slots, weights, index, experts, out)
    return out


def _sum(slots: torch.Tensor, weights: torch.Tensor, index: torch.Tensor, experts: int) -> torch.Tensor:
    terms = slots.double().view(*index.shape, slots.shape[1]) * weights.double()[..., None]
    return torch.where((index < experts)[..., None], terms, 0).sum(1)


@pytest.mark.parametrize("problem", PROBLEMS, ids=repr)
def test_the_weighted_sum_leaves_out_skipped_slots(launchers, problem, dtype):
    _, index, weights, *_ = problem.draw("cpu", dtype)
    slots, weights = _slots(problem, index, dtype), weights.masked_fill(index == problem.E, torch.nan)
    with poisoned_memory("cpu"):
        out = _combine(launchers, slots, weights, index, problem.E)
    assert out.dtype == dtype
    assert_close("combine", _sum(slots, weights, index, problem.E), out, RATIO[dtype])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_may_have_any_strides_and_a_wider_dtype(launchers, layout):
    problem = Problem()
    _, index, weights, *_ = problem.draw("cpu", torch.float16, weights_dtype=torch.float32)
    slots, weights = _slots(problem, index, torch.float16), lay_out(weights, layout)
    out = _combine(launchers, slots, weights, index, problem.E)
    assert_close("combine", _sum(slots, weights, index, problem.E), out, RATIO[torch.float16])


def test_terms_are_added_in_fp32_and_rounded_once(launchers):
    index, weights = torch.arange(3)[None], torch.ones(1, 3, dtype=torch.float16)
    slots = torch.tensor([[2048.0], [1.0], [-2048.0]], dtype=torch.float16)  # in fp16, 2048 + 1 is 2048
    assert _combine(launchers, slots, weights, index, 4).item() == 1.0


@pytest.mark.parametrize("wanted", [True, False], ids=["hidden_states too", "weights alone"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=repr)
def test_backward_adds_up_slots_and_parts_and_gives_skipped_slots_zero(launchers, problem, wanted):
    index = problem.draw_index("cpu")
    slots = _slots(problem, index, torch.float16)
    parts = torch.stack([_slots(problem, index, torch.float32)[:, 0] for _ in range(3)])
    with poisoned_memory("cpu"):
        grad_hidden, grad_weights = torch.empty(problem.T, problem.H).half(), torch.empty(index.shape).half()
        rows = (slots, grad_hidden) if wanted else (None, None)
        launchers.combine_backward(rows[0], parts, index, problem.E, rows[1], grad_weights)
    ref = torch.where(index < problem.E, parts.double().sum(0).view(index.shape), 0)
    assert grad_weights.dtype == torch.float16
    assert_close("gradient of weights", ref, grad_weights, RATIO[torch.float16])
    if wanted:
        ref = _sum(slots, torch.ones(index.shape), index, problem.E)
        assert_close("gradient of hidden_states", ref, grad_hidden, RATIO[torch.float16])


@pytest.mark.parametrize("width", [64, 24])
def test_a_window_of_columns_fills_its_share_alone(launchers, width):
    """Slots lie in wider rows, as the last window's do, and so do the sums."""
    problem = Problem(H=200)
    index = problem.draw_index("cpu")
    slots, weights = _slots(problem, index, torch.float16), torch.rand(index.shape).half()
    for col in (0, 32, problem.H - width):
        out, grad = torch.full((2, problem.T, problem.H), torch.nan).half()
        window, share = slots[:, :width], slice(col, col + width)
        launchers.combine(window, weights, index, problem.E, out[:, share])
        launchers.combine_backward(window, None, index, problem.E, grad[:, share], None)
        for name, got, scale in (("combine", out, weights), ("gradient", grad, torch.ones(index.shape))):
            assert_close(name, _sum(window, scale, index, problem.E), got[:, share], RATIO[torch.float16])
            got[:, share] = torch.nan
            assert got.isnan().all(), "a column of another window was written"
