"""Tensors of more than 2^31 elements: every offset into them must be computed in 64 bits.

The oracle's dense products would not fit, so it sees samples: some rows, or one expert with all its rows.
"""

import pytest
import torch

from .. import oracle
from ..oracle import RATIO, assert_close
from ..poison import poisoned_memory
from .shapes import real

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
ROWS, WIDE, THIN, EXPERTS = 1_100_000, 2048, 16, 8
M_SIZES = (400_000, 0, 1, 99_999, 300_000, 150_000, 150_000, ROWS - 1_100_000)


def _random(*shape: int) -> torch.Tensor:
    """bf16 at once: a copy in fp32 of the largest of these would take another 9 GB."""
    return torch.randn(shape, dtype=BF16, device="cuda")


def _sample(rows: int) -> torch.Tensor:
    """Some rows, the first and the last among them."""
    some = torch.randint(rows, (60,), device="cuda")
    return torch.cat((some, torch.tensor([0, 1, rows - 2, rows - 1], device="cuda")))


def _experts_of(rows: torch.Tensor, m_sizes: torch.Tensor) -> torch.Tensor:
    return torch.searchsorted(m_sizes.cumsum(0), rows, right=True)


def _check_linear(kernel, input: torch.Tensor, weight: torch.Tensor) -> None:
    m_sizes = torch.tensor(M_SIZES, device="cuda")
    input.requires_grad_()
    weight.requires_grad_()
    with poisoned_memory("cuda"):
        out = kernel.moe_fused_linear(input, weight, m_sizes)
        grad_output = _random(*out.shape)
        grad_input, grad_weight = torch.autograd.grad(out, (input, weight), grad_output)
    rows = _sample(ROWS)
    own = weight.detach()[_experts_of(rows, m_sizes)].double()
    assert_close(
        "rows of output", torch.einsum("bi,boi->bo", input.detach()[rows].double(), own), out[rows], RATIO[BF16]
    )
    ref = torch.einsum("bo,boi->bi", grad_output[rows].double(), own)
    assert_close("rows of the gradient of input", ref, grad_input[rows], RATIO[BF16])
    start = sum(M_SIZES[:-2])  # the last expert with rows
    ref = grad_output[start:].double().t() @ input.detach()[start:].double()
    assert_close("gradient of weight", ref, grad_weight[-2], RATIO[BF16])
    assert not grad_weight[1].any() and not grad_weight[-1].any()


def test_linear_with_a_large_output(kernel):
    _check_linear(kernel, _random(ROWS, THIN), _random(EXPERTS, WIDE, THIN))


def test_linear_with_a_large_input(kernel):
    _check_linear(kernel, _random(ROWS, WIDE), _random(EXPERTS, THIN, WIDE))


def test_linear_with_a_large_input_stored_transposed(kernel):
    _check_linear(kernel, _random(WIDE, ROWS).t(), _random(EXPERTS, THIN, WIDE))


def test_linear_with_large_weights(kernel):
    experts, size = 129, 4096
    weight = _random(experts, size, size).requires_grad_()
    m_sizes = torch.zeros(experts, dtype=torch.int32, device="cuda")
    m_sizes[0], m_sizes[-1] = 2, 3
    input = _random(5, size)
    out = kernel.moe_fused_linear(input, weight, m_sizes)
    (grad,) = torch.autograd.grad(out, weight, out.detach())
    for expert, rows in ((0, slice(0, 2)), (-1, slice(2, 5))):
        ref = input[rows].double() @ weight.detach()[expert].double().t()
        assert_close("output", ref, out[rows], RATIO[BF16])
        ref = out.detach()[rows].double().t() @ input[rows].double()
        assert_close("gradient of weight", ref, grad[expert], RATIO[BF16])
    assert not grad[1:-1].any()


def test_experts_with_a_large_pre_activation(kernel):
    """1.4 million slots: (S, 2I) has more than 2^31 elements, (S, H) too."""
    problem = real(175_000)
    assert problem.T * problem.k * 2 * problem.I > 2**31
    inputs = problem.draw("cuda", BF16)
    leaves = [x.requires_grad_() if x.is_floating_point() else x for x in inputs[:-1]]
    with poisoned_memory("cuda"):
        out = kernel.fused_experts(*leaves)
        grads = torch.autograd.grad(out, [x for x in leaves if x.requires_grad], inputs.grad_output)

    tokens = _sample(problem.T)
    some = {name: x.detach()[tokens] if x.shape[0] == problem.T else x.detach() for name, x in inputs._asdict().items()}
    grad_output = some.pop("grad_output")
    ref, (grad_hidden, grad_weights) = oracle.gradients(
        oracle.experts, some, ("hidden_states", "top_k_weights"), grad_output
    )
    assert_close("tokens of the output", ref, out[tokens], RATIO[BF16])
    assert_close("tokens of the gradient of hidden_states", grad_hidden, grads[0][tokens], RATIO[BF16])
    assert_close("tokens of the gradient of top_k_weights", grad_weights, grads[1][tokens], RATIO[BF16])

    expert = problem.E - 1
    token, choice = (inputs.top_k_index == expert).nonzero(as_tuple=True)
    alone = {
        "hidden_states": inputs.hidden_states.detach()[token],
        "top_k_index": torch.zeros(len(token), 1, dtype=torch.int64, device="cuda"),
        "top_k_weights": inputs.top_k_weights.detach()[token, choice][:, None],
        "gate_up_proj": inputs.gate_up_proj.detach()[expert:],
        "down_proj": inputs.down_proj.detach()[expert:],
    }
    _, (grad_gate_up, grad_down) = oracle.gradients(
        oracle.experts, alone, ("gate_up_proj", "down_proj"), inputs.grad_output[token]
    )
    assert_close("the last expert's gradient of gate_up_proj", grad_gate_up[0], grads[2][expert], RATIO[BF16])
    assert_close("the last expert's gradient of down_proj", grad_down[0], grads[3][expert], RATIO[BF16])
