"""Compiled kernels are kept and launched directly: a call that differs in anything they rely on must not get them."""

from dataclasses import replace

import pytest
import torch

from ..agreement import assert_experts_agree
from ..oracle import RATIO, assert_close
from ..problems import LinearProblem
from .shapes import DEEP

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
SHALLOW = replace(DEEP, T=24)


def _off_by_one(tensor: torch.Tensor) -> torch.Tensor:
    """The same values and strides, one element past an aligned address."""
    return torch.cat((tensor.new_zeros(1), tensor.flatten()))[1:].view(tensor.shape)


@pytest.fixture(scope="module")
def expected(kernel):
    """A draw and its results from aligned tensors, which leave compiled kernels behind."""
    inputs = SHALLOW.draw("cuda", BF16)
    return inputs, _results(kernel, *inputs)


def _results(kernel, *tensors: torch.Tensor) -> list[torch.Tensor]:
    *arguments, grad_output = (x.detach() for x in tensors)
    leaves = [x.requires_grad_() for x in arguments if x.is_floating_point()]
    out = kernel.fused_experts(*arguments)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_output)]


@pytest.mark.parametrize("position", range(6), ids=["hidden", "index", "weights", "gate_up", "down", "grad_output"])
def test_a_misaligned_tensor_after_an_aligned_one(kernel, expected, position):
    inputs, results = expected
    moved = [_off_by_one(x) if i == position else x for i, x in enumerate(inputs)]
    for ref, out in zip(results, _results(kernel, *moved)):
        assert_close("results", ref, out, RATIO[BF16])


def test_another_integer_dtype_after_the_usual_one(kernel, expected):
    inputs, results = expected
    again = _results(kernel, inputs[0], inputs.top_k_index.int(), *inputs[2:])
    assert all(map(torch.equal, results, again))


def test_wider_routing_weights_after_narrow_ones(kernel):
    for weights_dtype in (BF16, torch.float32, BF16):
        assert_experts_agree(kernel, SHALLOW, "cuda", BF16, weights_dtype=weights_dtype)


def test_m_sizes_of_another_integer_dtype_after_the_usual_one(kernel):
    input, weight, m_sizes, _ = LinearProblem(M=64, N=64, K=64).draw("cuda", BF16)
    first, second = (kernel.moe_fused_linear(input, weight, sizes) for sizes in (m_sizes.int(), m_sizes.long()))
    assert torch.equal(first, second)


def test_every_number_of_tokens_with_the_same_kernels(kernel):
    for tokens in (1, 2, 16, 17, 24, 32):
        assert_experts_agree(kernel, replace(DEEP, T=tokens), "cuda", BF16)
