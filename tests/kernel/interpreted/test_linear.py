"""moe_fused_linear and its gradients through the Triton kernels."""

import importlib

import pytest
import torch
from hypothesis import given, settings

from .. import strategies
from ..agreement import assert_linear_agrees, assert_rows_without_expert_are_zero
from ..poison import poisoned_memory
from ..problems import BALANCES, LAYOUTS, LinearProblem

PROBLEMS = [
    *(LinearProblem(M=40, N=33, K=65, E=5, imbalance=imbalance) for imbalance in BALANCES),
    LinearProblem(M=30, N=1),
    LinearProblem(M=30, K=1),
    LinearProblem(M=1),
    LinearProblem(M=0),
    LinearProblem(N=0),
    LinearProblem(K=0),
    LinearProblem(M=400, E=2, N=17, K=17),  # enough rows per expert for the largest tiles
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=repr)
def test_each_row_meets_the_matrix_of_its_expert(triton_kernel, problem, dtype):
    assert_linear_agrees(triton_kernel, problem, "cpu", dtype)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_any_strides_give_the_same(triton_kernel, layout):
    layouts = {"input": layout, "weight": layout, "grad_output": layout}
    assert_linear_agrees(triton_kernel, LinearProblem(), "cpu", torch.float32, layouts)


@settings(max_examples=40)
@given(
    strategies.linear_problems(most_rows=40, widest=40),
    strategies.dtypes(torch.float32, torch.float16),
    strategies.linear_layouts(),
)
def test_any_problem_agrees_with_the_oracle(triton_kernel, problem, dtype, layouts):
    assert_linear_agrees(triton_kernel, problem, "cpu", dtype, layouts)


@pytest.mark.parametrize("sizes", [[5, 9, 7], [0, 20, 90], [20, -9, 5]], ids=["few", "many", "negative"])
def test_m_sizes_that_do_not_fit_leave_zeros_behind_and_nothing_past_the_end(triton_kernel, sizes):
    assert_rows_without_expert_are_zero(triton_kernel, LinearProblem(E=3), "cpu", sizes)


def test_rows_without_any_expert_are_zero(triton_kernel):
    with poisoned_memory("cpu"):
        out = triton_kernel.moe_fused_linear(torch.ones(4, 3), torch.empty(0, 5, 3), torch.empty(0, dtype=torch.int32))
    assert torch.equal(out, torch.zeros(4, 5))


@pytest.mark.parametrize(("stride", "copied"), [(2**25 - 1, False), (2**25, True), (2**40, True)])
def test_columns_out_of_reach_of_32_bits_are_brought_near(kernel, stride, copied):
    near = importlib.import_module(f"{kernel.__name__}.kernels.product").near
    for shape, strides in (((3, 64), (1, stride)), ((2, 3, 64), (7, 1, stride))):
        tensor = torch.empty_strided(shape, strides, device="meta")
        assert (near(tensor, 64) is not tensor) == copied
        assert near(tensor, 64).stride(-1) == (1 if copied else stride)


@pytest.mark.parametrize("short_by", [0, 1])
def test_rows_that_are_far_from_themselves_are_copied_first(triton_kernel, monkeypatch, short_by):
    """Of a transposed input and gradient, as if offsets reached less far."""
    linear, product = (importlib.import_module(f"{triton_kernel.__name__}.kernels.{x}") for x in ("linear", "product"))
    problem = LinearProblem(M=33, N=16, K=16)
    monkeypatch.setattr(product, "REACH", 16 * problem.M + short_by)
    seen, tiles = [], linear.linear_tiles
    monkeypatch.setattr(linear, "linear_tiles", lambda a, *rest, **more: seen.append(a) or tiles(a, *rest, **more))
    assert_linear_agrees(
        triton_kernel, problem, "cpu", torch.float32, {"input": "transposed", "grad_output": "transposed"}
    )
    assert [a.is_contiguous() for a in seen] == [not short_by] * 2
