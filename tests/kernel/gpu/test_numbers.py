"""Results and gradients on a CUDA device, against the oracle on the same device."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ..agreement import (
    assert_experts_agree,
    assert_linear_agrees,
    assert_rows_without_expert_are_zero,
    assert_stray_id_is_skipped,
)
from ..oracle import RATIO, assert_close
from ..poison import poisoned_memory
from ..problems import BALANCES, SKIPPING, LinearProblem
from ..tables import assert_table_holds
from .shapes import DEEP, ODD, ODD_LINEAR, real

pytestmark = pytest.mark.gpu

THIN = [LinearProblem(M=500, N=1, K=64), LinearProblem(M=500, N=64, K=1), LinearProblem(M=4000, N=8, K=256)]
EMPTY = [LinearProblem(M=0), LinearProblem(N=0), LinearProblem(K=0)]
ARGUMENTS = ("hidden_states", "top_k_index", "top_k_weights", "gate_up_proj", "down_proj", "grad_output")


@pytest.mark.parametrize("tokens", [1, 16, 300])
def test_the_real_layer_in_bf16(kernel, tokens):
    assert_experts_agree(kernel, real(tokens), "cuda", torch.bfloat16)


@pytest.mark.parametrize("other", [torch.float16, torch.float32], ids=str)
def test_the_real_layer_in_other_dtypes(kernel, other):
    assert_experts_agree(kernel, real(16), "cuda", other)


def test_odd_sizes(kernel, dtype):
    assert_experts_agree(kernel, ODD, "cuda", dtype)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("imbalance", BALANCES[1:] + SKIPPING)
def test_odd_sizes_with_any_balance(kernel, imbalance):
    assert_experts_agree(kernel, replace(ODD, imbalance=imbalance), "cuda", torch.bfloat16)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_odd_sizes_with_every_activation(kernel, activation):
    assert_experts_agree(kernel, replace(ODD, activation=activation), "cuda", torch.bfloat16)


@pytest.mark.parametrize("layout", ["transposed", "padded", "expanded"])
def test_odd_sizes_with_any_strides(kernel, layout):
    assert_experts_agree(kernel, ODD, "cuda", torch.bfloat16, dict.fromkeys(ARGUMENTS, layout))


@settings(max_examples=40)
@given(
    tokens=st.integers(0, 70),
    imbalance=st.sampled_from(BALANCES + SKIPPING),
    seed=st.integers(0, 2**31 - 1),
)
def test_odd_sizes_with_any_number_of_tokens(kernel, tokens, imbalance, seed):
    assert_experts_agree(kernel, replace(ODD, T=tokens, imbalance=imbalance, seed=seed), "cuda", torch.bfloat16)


@pytest.mark.parametrize("imbalance", ["random", "one_takes_all"])
def test_many_rows_an_expert(kernel, imbalance):
    assert_experts_agree(kernel, replace(DEEP, imbalance=imbalance), "cuda", torch.bfloat16)


@pytest.mark.parametrize("layout", ["transposed", "padded", "aligned"])
def test_many_rows_an_expert_with_any_weight_strides(kernel, layout):
    layouts = {"gate_up_proj": layout, "down_proj": layout}
    assert_experts_agree(kernel, DEEP, "cuda", torch.bfloat16, layouts, trained=("hidden_states",))


def test_odd_linear(kernel, dtype):
    assert_linear_agrees(kernel, ODD_LINEAR, "cuda", dtype)


@pytest.mark.parametrize("layout", ["transposed", "padded", "expanded"])
def test_odd_linear_with_any_strides(kernel, layout):
    layouts = dict.fromkeys(("input", "weight", "grad_output"), layout)
    layouts |= {"m_sizes": "transposed"} if layout == "transposed" else {}
    assert_linear_agrees(kernel, ODD_LINEAR, "cuda", torch.bfloat16, layouts)


@pytest.mark.parametrize("problem", THIN + EMPTY, ids=repr)
def test_thin_and_empty_linear(kernel, problem):
    assert_linear_agrees(kernel, problem, "cuda", torch.bfloat16)


@settings(max_examples=40)
@given(
    rows=st.integers(0, 300),
    imbalance=st.sampled_from(BALANCES),
    seed=st.integers(0, 2**31 - 1),
)
def test_odd_linear_with_any_number_of_rows(kernel, rows, imbalance, seed):
    problem = replace(ODD_LINEAR, M=rows, imbalance=imbalance, seed=seed)
    assert_linear_agrees(kernel, problem, "cuda", torch.bfloat16)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("imbalance", BALANCES + SKIPPING)
@pytest.mark.parametrize(
    ("tokens", "experts"), [(1, 128), (1024, 128), (1025, 128), (20000, 128), (4096, 8), (3001, 500)]
)
def test_the_routing_table_is_right_to_the_last_integer(kernel, tokens, experts, imbalance):
    index = replace(real(tokens), E=experts, imbalance=imbalance).draw_index("cuda")
    with poisoned_memory("cuda"):
        table = kernel.routing(index, experts)
    assert_table_holds(table, index, experts, 128)


@pytest.mark.parametrize("stray", [-1, 8, 2**31, 2**32, -(2**40)])
def test_an_id_outside_the_experts_counts_as_one_to_skip(kernel, stray):
    assert_stray_id_is_skipped(kernel, ODD, "cuda", stray)


@pytest.mark.parametrize("sizes", [[20, 30, 25], [0, 40, 90], [60, -9, 20]], ids=["few", "many", "negative"])
def test_m_sizes_that_do_not_fit_leave_zeros_behind_and_nothing_past_the_end(kernel, sizes):
    assert_rows_without_expert_are_zero(kernel, replace(ODD_LINEAR, E=3), "cuda", sizes)


def test_fp32_products_are_ieee_not_tf32(kernel):
    """1 + 2^-12 is lost in TF32's 10 bits; times 1, the product must give it back."""
    input = torch.full((32, 64), 1 + 2.0**-12, device="cuda")
    weight = torch.eye(64, device="cuda")[None]
    assert torch.equal(kernel.moe_fused_linear(input, weight, torch.tensor([32], device="cuda")), input)


def test_gradients_of_gradients_of_the_linear_layer(kernel):
    """A gradient of a gradient, as a penalty on gradients takes it."""
    input, weight, m_sizes, _ = ODD_LINEAR.draw("cuda", torch.float32)
    weight.requires_grad_()
    input.requires_grad_()
    (grad,) = torch.autograd.grad(kernel.moe_fused_linear(input, weight, m_sizes).sum(), input, create_graph=True)
    grad.square().sum().backward()
    expert = torch.repeat_interleave(torch.arange(len(m_sizes), device="cuda"), m_sizes.long())
    columns = weight.detach().double().sum(1)
    ref = 2 * columns[:, None, :] * torch.bincount(expert, minlength=len(m_sizes))[:, None, None]
    assert_close("gradient of the gradient", ref.expand_as(weight), weight.grad, RATIO[torch.float32])
