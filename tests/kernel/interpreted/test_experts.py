"""fused_experts and its gradients through the Triton kernels."""

import pytest
import torch
from hypothesis import given, settings

from .. import strategies
from ..agreement import assert_experts_agree
from ..problems import BALANCES, LAYOUTS, SKIPPING, Problem

PROBLEMS = [
    *(Problem(T=11, k=3, E=5, H=40, I=33, imbalance=imbalance) for imbalance in BALANCES + SKIPPING),
    Problem(T=1, k=4),
    Problem(T=0),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=repr)
def test_the_layer_and_its_gradients_are_the_oracles(triton_kernel, problem, dtype):
    assert_experts_agree(triton_kernel, problem, "cpu", dtype)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_every_activation_and_its_slope(triton_kernel, activation):
    assert_experts_agree(triton_kernel, Problem(activation=activation), "cpu", torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("argument", ["top_k_weights", "the others"])
def test_any_strides_give_the_same(triton_kernel, argument, layout):
    names = {"hidden_states", "top_k_index", "gate_up_proj", "down_proj", "grad_output"}
    names = {"top_k_weights"} if argument == "top_k_weights" else names
    assert_experts_agree(triton_kernel, Problem(), "cpu", torch.float32, dict.fromkeys(names, layout))


@settings(max_examples=8)
@given(
    strategies.expert_problems(most_tokens=12, widest=40),
    strategies.dtypes(torch.float32, torch.float16),
    strategies.expert_layouts(),
)
def test_any_problem_agrees_with_the_oracle(triton_kernel, problem, dtype, layouts):
    assert_experts_agree(triton_kernel, problem, "cpu", dtype, layouts)
