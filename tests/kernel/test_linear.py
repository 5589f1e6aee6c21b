"""moe_fused_linear on the CPU backend: the product, its gradients and their gradients."""

import pytest
import torch
from hypothesis import given, settings

from . import oracle, strategies
from .agreement import assert_linear_agrees
from .modes import Seen
from .oracle import RATIO, assert_close
from .problems import BALANCES, LAYOUTS, LinearProblem

PROBLEMS = [
    *(LinearProblem(M=40, N=33, K=65, E=7, imbalance=imbalance) for imbalance in BALANCES),
    LinearProblem(M=9, N=16, K=24, E=9, imbalance="one_row_each"),
    LinearProblem(M=200, N=1),
    LinearProblem(M=200, K=1),
    LinearProblem(M=1, E=128),
    LinearProblem(M=60, E=1),
    LinearProblem(M=0),
    LinearProblem(N=0),
    LinearProblem(K=0),
]


@pytest.mark.kernels_ci
@pytest.mark.parametrize("problem", PROBLEMS, ids=repr)
def test_each_row_meets_the_matrix_of_its_expert(kernel, problem, dtype):
    assert_linear_agrees(kernel, problem, "cpu", dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("argument", ["input", "weight", "grad_output"])
def test_any_strides_give_the_same(kernel, argument, layout):
    assert_linear_agrees(kernel, LinearProblem(), "cpu", torch.float32, {argument: layout})


@settings(max_examples=150)
@given(
    strategies.linear_problems(),
    strategies.dtypes(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    strategies.linear_layouts(),
)
def test_any_problem_agrees_with_the_oracle(kernel, problem, dtype, layouts):
    assert_linear_agrees(kernel, problem, "cpu", dtype, layouts)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_m_sizes_may_be_of_either_integer_dtype(kernel, device, index_dtype):
    input, weight, m_sizes, _ = LinearProblem().draw(device, torch.float32)
    out = kernel.moe_fused_linear(input, weight, m_sizes.to(index_dtype))
    ref = oracle.linear(input.double(), weight.double(), m_sizes)
    assert_close("output", ref, out, RATIO[torch.float32])


def test_the_output_is_contiguous_whatever_comes_in(kernel, device):
    input, weight, m_sizes, _ = LinearProblem().draw(device, torch.float32)
    assert kernel.moe_fused_linear(input.t().contiguous().t(), weight, m_sizes).is_contiguous()


def test_gradients_of_gradients_exist_and_are_right(kernel):
    input, weight, m_sizes, _ = LinearProblem(M=6, N=3, K=4, E=3).draw("cpu", torch.float64)
    arguments = (input.requires_grad_(), weight.requires_grad_(), m_sizes)
    assert torch.autograd.gradcheck(kernel.moe_fused_linear, arguments)
    assert torch.autograd.gradgradcheck(kernel.moe_fused_linear, arguments)


def test_only_the_gradients_asked_for_are_computed(kernel, device):
    input, weight, m_sizes, _ = LinearProblem().draw(device, torch.float32)
    arguments = [input.requires_grad_(), weight.requires_grad_(), m_sizes]
    for asked, op in ((0, "moe_fused_linear"), (1, "moe_fused_linear_weight_grad")):
        leaves = [x if i == asked else x.detach() for i, x in enumerate(arguments)]
        out = kernel.moe_fused_linear(*leaves)
        with Seen() as seen:
            out.sum().backward()
        assert seen.ops == [op] and leaves[asked].grad is not None
    assert not kernel.moe_fused_linear(*(x.detach() for x in arguments)).requires_grad
