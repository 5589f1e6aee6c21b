"""Adapters per expert: added to either projection, trained, with dropout, over dense and 4-bit weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from . import strategies
from .adapted import Adapter, Quantization, assert_adapted_experts_agree
from .oracle import RATIO, assert_close
from .problems import Problem

ADAPTERS = [
    Adapter(),
    Adapter(halves=2),
    Adapter(gate_up_rank=1, down_rank=16),
    Adapter(gate_up_rank=33, down_rank=1, halves=2, scaling=2.0),
    Adapter(dtype=torch.float32),
]


@pytest.mark.parametrize("adapter", ADAPTERS, ids=repr)
@pytest.mark.parametrize("problem", [Problem(), Problem(T=21, k=3, E=5, H=40, I=33, imbalance="some_skipped")])
def test_the_layer_and_its_gradients_are_the_oracles(kernel, device, dtype, adapter, problem):
    assert_adapted_experts_agree(kernel, problem, device, dtype, adapter=adapter)


def test_factors_in_bf16_beside_tokens_in_fp16(kernel, device):
    adapter, ratio = Adapter(dtype=torch.bfloat16), RATIO[torch.bfloat16]
    assert_adapted_experts_agree(kernel, Problem(), device, torch.float16, adapter=adapter, ratio=ratio)


@pytest.mark.parametrize("adapter", ADAPTERS[:2], ids=repr)
def test_adapters_over_4_bit_weights(kernel, device, dtype, adapter):
    assert_adapted_experts_agree(kernel, Problem(H=64, I=64), device, dtype, Quantization(), adapter)


def test_adapters_and_dense_weights_train_together(kernel, device):
    trained = ("hidden_states", "gate_up_proj", "down_proj", "gate_up_B", "down_A")
    inputs = Problem().draw(device, torch.float32)
    factors = Adapter().draw(Problem(), device, torch.float32)
    leaves = {name: x.requires_grad_(name in trained) for name, x in (inputs._asdict() | factors).items()}
    gate_up, down = (kernel.Lora(leaves[f"{p}_A"], leaves[f"{p}_B"], 0.5) for p in ("gate_up", "down"))
    out = kernel.fused_experts(*inputs[:-1], gate_up_lora=gate_up, down_lora=down)
    merged = inputs.gate_up_proj + 0.5 * gate_up.B @ gate_up.A, inputs.down_proj + 0.5 * down.B @ down.A
    ref = kernel.fused_experts(*inputs[:3], *merged)
    assert_close("output", ref, out, RATIO[torch.float32])
    wanted = [leaves[name] for name in trained]
    for name, want, got in zip(trained, *(torch.autograd.grad(x, wanted, inputs.grad_output) for x in (ref, out))):
        assert_close(f"gradient of {name}", want, got, RATIO[torch.float32])


@settings(max_examples=60)
@given(
    strategies.expert_problems(),
    strategies.dtypes(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    st.builds(Adapter, st.integers(1, 20), st.integers(1, 20), st.integers(1, 2), st.floats(0.25, 1)),
)
def test_any_problem_agrees_with_the_oracle(kernel, problem, dtype, adapter):
    assert_adapted_experts_agree(kernel, problem, "cpu", dtype, adapter=adapter)


def test_dropout_is_a_linear_map_that_backward_repeats(kernel, device):
    """The layer with dropout is linear in B; its gradient in B, and in A through a finite difference, must be of the
    same mask that forward drew."""
    inputs = Problem(T=16).draw(device, torch.float64 if device == "cpu" else torch.float32)
    factors = Adapter().draw(Problem(), device, inputs.hidden_states.dtype)

    def loss(step: float = 0.0, direction=None):
        torch.manual_seed(7)
        A = factors["down_A"] if direction is None else factors["down_A"] + step * direction
        leaves = [x.detach().requires_grad_() for x in (A, factors["down_B"])]
        out = kernel.fused_experts(*inputs[:-1], down_lora=kernel.Lora(*leaves, dropout=0.5))
        total = (out * inputs.grad_output).sum()
        return total, torch.autograd.grad(total, leaves)

    total, (grad_A, grad_B) = loss()
    again, grads = loss()
    assert total == again and torch.equal(grad_A, grads[0]) and torch.equal(grad_B, grads[1])
    direction = torch.randn_like(factors["down_A"])
    slope = (loss(1.0, direction)[0] - loss(-1.0, direction)[0]) / 2  # linear in A too: exact for any step
    assert_close("slope along A", slope.double(), (grad_A * direction).sum(), 1e-9 if device == "cpu" else 1e-3)


def test_dropout_keeps_its_share_and_the_mean(kernel, device):
    """B = 1, A = 1, W = 0 and one expert: each token's result counts the elements that were kept."""
    ones = dict(dtype=torch.float32, device=device)
    tokens, width, dropout = 512, 256, 0.25
    hidden, weights = torch.ones(tokens, width, **ones), torch.ones(tokens, 1, **ones)
    index = torch.zeros(tokens, 1, dtype=torch.long, device=device)
    gate_up, down = torch.zeros(1, 2, width, **ones), torch.ones(1, width, 1, **ones)
    lora = kernel.Lora(torch.ones(1, 1, width, **ones), torch.ones(1, 2, 1, **ones), 1.0, dropout)
    torch.manual_seed(3)
    out = kernel.fused_experts(hidden, index, weights, gate_up, down, "silu", lora)[:, 0]
    gate = (torch.arange(width + 1, **ones) / (1 - dropout)).double()
    kept = (torch.nn.functional.silu(gate) * gate - out.double()[:, None]).abs().argmin(1)
    share = kept.double().mean() / width
    assert abs(share - (1 - dropout)) < 5 * (dropout * (1 - dropout) / (tokens * width)) ** 0.5
    assert 0.5 < kept.double().var() / (width * dropout * (1 - dropout)) < 1.5


MISTAKES = [
    (lambda A, B: (A[0], B), ValueError, r"down_lora.A must have shape \(E, r, K\), got \(4, 16\)"),
    (lambda A, B: (A.long(), B.long()), TypeError, r"down_lora.A must be one of .*, got torch.int64"),
    (lambda A, B: (A[1:], B), ValueError, r"down_lora.A must have size 4 in dimension 0 \(E of down_proj\)"),
    (lambda A, B: (A, B.half()), TypeError, r"down_lora.B must be torch.float32 like down_lora.A, got torch.float16"),
    (lambda A, B: (A[..., 1:], B), ValueError, r"down_lora.A must have size 16 in dimension 2 \(K of down_proj\)"),
    (lambda A, B: (A, B[:, 1:]), ValueError, r"down_lora.B must have size 23 in dimension 1 \(N of down_proj\)"),
    (lambda A, B: (A[:, 1:], B), ValueError, r"down_lora.A must have size 4 or 8 \(r or 2r of down_lora.B\)"),
    (lambda A, B: (A[:, :0], B[..., :0]), ValueError, r"down_lora.A must have size 0 or 0 \(r or 2r of down_lora.B\)"),
    (lambda A, B: (torch.cat((A, A), 1), B), ValueError, "has two halves, so N of down_proj must be even, got 23"),
    (lambda A, B: (A.to("meta"), B), ValueError, r"down_lora.A must be on \w+(:0)? like down_proj, got meta"),
    (lambda A, B: (A, B, 1.0, 1.0), ValueError, r"down_lora.dropout must lie in \[0, 1\), got 1.0"),
]


@pytest.mark.parametrize(("spoil", "error", "message"), MISTAKES, ids=[message for *_, message in MISTAKES])
def test_factors_that_do_not_fit_are_named(kernel, device, spoil, error, message):
    problem = Problem(H=23)
    inputs = problem.draw(device, torch.float32)
    factors = Adapter().draw(problem, device, torch.float32)
    kernel.fused_experts(*inputs[:-1], down_lora=kernel.Lora(factors["down_A"], factors["down_B"]))
    with pytest.raises(error, match=message):
        kernel.fused_experts(*inputs[:-1], down_lora=kernel.Lora(*spoil(factors["down_A"], factors["down_B"])))


@pytest.mark.parametrize("name", ["gate_up_lora", "down_lora"])
def test_what_is_no_lora_is_named(kernel, device, name):
    inputs = Problem().draw(device, torch.float32)
    factors = Adapter().draw(Problem(), device, torch.float32)
    pair = tuple(factors[name.replace("lora", letter)] for letter in "AB")
    kernel.fused_experts(*inputs[:-1], **{name: kernel.Lora(*pair)})
    with pytest.raises(TypeError, match=f"{name} must be a Lora, got tuple"):
        kernel.fused_experts(*inputs[:-1], **{name: pair})
