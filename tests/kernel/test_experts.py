"""fused_experts: the layer and its gradients on the CPU backend, and what holds on every backend."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings

from . import oracle, strategies
from .agreement import DIFFERENTIABLE, assert_experts_agree
from .modes import Seen
from .oracle import ACTIVATIONS, RATIO, assert_close
from .poison import poisoned_memory
from .problems import BALANCES, LAYOUTS, SKIPPING, ExpertsInputs, Problem

PROBLEMS = [
    *(Problem(T=40, k=3, E=7, H=40, I=33, imbalance=imbalance) for imbalance in BALANCES + SKIPPING),
    Problem(T=16, k=8, E=128, imbalance="one_row_each"),
    Problem(T=1, k=4),
    Problem(T=50, k=1, E=1),
    Problem(T=0),
]


@pytest.mark.kernels_ci
@pytest.mark.parametrize("problem", PROBLEMS, ids=repr)
def test_the_layer_and_its_gradients_are_the_oracles(kernel, problem, dtype):
    assert_experts_agree(kernel, problem, "cpu", dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_and_its_slope(kernel, activation, dtype):
    assert_experts_agree(kernel, Problem(activation=activation), "cpu", dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("argument", ExpertsInputs._fields)
def test_any_strides_give_the_same(kernel, argument, layout):
    assert_experts_agree(kernel, Problem(), "cpu", torch.float32, {argument: layout})


@settings(max_examples=150)
@given(
    strategies.expert_problems(),
    strategies.dtypes(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    strategies.expert_layouts(),
)
def test_any_problem_agrees_with_the_oracle(kernel, problem, dtype, layouts):
    assert_experts_agree(kernel, problem, "cpu", dtype, layouts)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_each_gradient_can_be_had_alone(kernel, device, name):
    assert_experts_agree(kernel, Problem(), device, torch.float32, trained=(name,))


def test_routing_weights_may_be_wider_than_the_hidden_states(kernel, device):
    assert_experts_agree(kernel, Problem(), device, torch.float16, weights_dtype=torch.float32)


def test_indices_may_be_of_either_integer_dtype(kernel, device):
    hidden, index, *rest, _ = Problem().draw(device, torch.float32)
    assert torch.equal(
        kernel.fused_experts(hidden, index.int(), *rest), kernel.fused_experts(hidden, index.long(), *rest)
    )


def test_reruns_are_bit_identical(kernel, device):
    inputs = Problem(T=64).draw(device, torch.float16)
    first = _results(kernel, inputs)
    for _ in range(5):
        assert all(torch.equal(again, before) for again, before in zip(_results(kernel, inputs), first))


def test_a_nan_routing_weight_reaches_only_its_own_token(kernel, device):
    inputs = Problem().draw(device, torch.float32)
    inputs.top_k_weights[5, 1] = float("nan")
    out, grad_hidden, grad_weights, *_ = _results(kernel, inputs)
    assert _rows_with_nan(out) == _rows_with_nan(grad_hidden) == {5}
    assert _rows_with_nan(grad_weights) == set()
    _assert_results_are_the_oracles(kernel, inputs, DIFFERENTIABLE)


def test_a_nan_hidden_state_reaches_only_its_own_token(kernel, device):
    inputs = Problem().draw(device, torch.float32)
    inputs.hidden_states[7, 3] = float("nan")
    out, grad_hidden, grad_weights, *_ = _results(kernel, inputs)
    assert _rows_with_nan(out) == _rows_with_nan(grad_hidden) == _rows_with_nan(grad_weights) == {7}
    _assert_results_are_the_oracles(kernel, inputs, ("hidden_states", "top_k_weights"))


def test_a_skipped_slot_adds_nothing_whatever_its_weight(kernel, device):
    inputs = Problem(imbalance="some_skipped").draw(device, torch.float32)
    skipped = inputs.top_k_index == 4
    inputs.top_k_weights[skipped] = float("nan")
    out, grad_hidden, grad_weights, *_ = _results(kernel, inputs)
    assert not out[skipped.all(1)].any() and not grad_hidden[skipped.all(1)].any()
    assert not grad_weights[skipped].any()
    _assert_results_are_the_oracles(kernel, inputs, DIFFERENTIABLE)


def test_an_expert_without_rows_gets_a_gradient_of_zeros(kernel, device):
    *_, grad_gate_up, grad_down = _results(kernel, Problem(imbalance="one_takes_all").draw(device, torch.float32))
    assert not grad_gate_up[:-1].any() and not grad_down[:-1].any()
    assert grad_gate_up[-1].any() and grad_down[-1].any()


def test_backward_keeps_the_inputs_the_pre_activation_and_indices_and_nothing_else(kernel, device):
    problem = Problem(T=32)
    inputs = problem.draw(device, torch.float32)
    own = {tensor.data_ptr() for tensor in inputs}
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        kernel.fused_experts(*_leaves(inputs))
    slots = problem.T * problem.k
    extra = sum(x.numel() * x.element_size() for x in kept if x.data_ptr() not in own)
    wanted = slots * 2 * problem.I * 4 + slots * 4 + problem.E * 4
    if device == "cpu":
        assert extra == wanted
    else:  # and the table of tiles, which backward would make again; each of three begins at a multiple of 16 bytes
        assert wanted < extra <= wanted + 4 * (problem.E + 1) + 12 * (slots // 16 + problem.E + 1) + 3 * 12


def test_without_gradients_nothing_is_kept(kernel, device):
    inputs = Problem().draw(device, torch.float32)
    with Seen() as seen:
        with torch.no_grad():
            assert not kernel.fused_experts(*_leaves(inputs)).requires_grad
        assert not kernel.fused_experts(*inputs[:-1]).requires_grad
        kernel.fused_experts(*_leaves(inputs))
    assert [arguments[-1] for arguments in seen.arguments] == [False, False, True], "whether forward saves"


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_the_inputs_first(kernel, device, low):
    inputs = Problem().draw(device, torch.float32)
    leaves = _leaves(inputs)
    with torch.autocast(device, dtype=low):
        out = kernel.fused_experts(*leaves)
    assert out.dtype == low
    out.backward(inputs.grad_output.to(low))
    assert leaves[0].grad.dtype == torch.float32
    ref = oracle.experts(*(x.to(low).double() if x.is_floating_point() else x for x in inputs[:-1]))
    assert_close("output", ref, out, RATIO[low])


def test_a_tokens_slots_are_weighted_and_added_in_fp32(kernel, device):
    """In fp16, the dtype of the slots, 1 + 2^-11 is 1 and 2048 + 1 is 2048."""
    hidden, index = torch.tensor([[16.0]] * 2, dtype=torch.float16), torch.tensor([[0, 2, 1], [2, 1, 0]])
    weights = torch.tensor([[2048.0, 1.0, 2048.0], [1 + 2.0**-11, 1.0, 0.0]])
    gate_up = torch.tensor([[1.0], [2.0**-8]], dtype=torch.float16).expand(3, 2, 1)  # silu(16) / 16, which is 1
    down = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float16).view(3, 1, 1)
    out = kernel.fused_experts(*(x.to(device) for x in (hidden, index, weights, gate_up, down)))
    assert out.flatten().tolist() == [1.0, 2.0**-11]


def test_a_gradient_that_nobody_has_is_none(kernel, device):
    """Where what comes after the layer passes no gradient on, autograd asks for the layer's all the same."""

    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    for mode in (nullcontext(), Seen()):
        hidden, *rest = _leaves(Problem().draw(device, torch.float32))
        with mode:
            (Stop.apply(kernel.fused_experts(hidden, *rest)).sum() + 2 * hidden.sum()).backward()
        assert torch.equal(hidden.grad, torch.full_like(hidden, 2)) and rest[-1].grad is None


def test_a_second_derivative_is_refused_rather_than_wrong(kernel):
    hidden, *rest = _leaves(Problem().draw("cpu", torch.float32))
    (grad,) = torch.autograd.grad(kernel.fused_experts(hidden, *rest).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="backward"):
        grad.sum().backward()


def _leaves(inputs: ExpertsInputs) -> list[torch.Tensor]:
    return [x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs[:-1]]


def _results(kernel, inputs: ExpertsInputs) -> tuple[torch.Tensor, ...]:
    """The output and the gradients of hidden_states, top_k_weights, gate_up_proj and down_proj."""
    leaves = _leaves(inputs)
    out = kernel.fused_experts(*leaves)
    return out.detach(), *torch.autograd.grad(out, [x for x in leaves if x.requires_grad], inputs.grad_output)


def _assert_results_are_the_oracles(kernel, inputs: ExpertsInputs, names: tuple[str, ...]) -> None:
    """NaN for NaN, and close everywhere else."""
    arguments = inputs._asdict()
    grad_output = arguments.pop("grad_output")
    ref, ref_grads = oracle.gradients(oracle.experts, arguments, names, grad_output)
    for name, want, got in zip(("output", *names), (ref, *ref_grads), _results(kernel, inputs)):
        assert torch.equal(want.isnan(), got.isnan()), f"{name}: NaN in other places"
        assert_close(name, want.nan_to_num(), got.nan_to_num(), RATIO[torch.float32])


def _rows_with_nan(tensor: torch.Tensor) -> set[int]:
    return set(tensor.isnan().any(dim=1).nonzero().flatten().tolist())


@pytest.mark.parametrize("adapted", [False, True])
def test_for_gradients_alone_they_are_the_same_without_the_result(kernel, device, adapted):
    hidden, index, weights, gate_up, down, *_ = Problem().draw(device, torch.float32)
    E, N, H = gate_up.shape
    factors = [torch.randn(E, 4, H), torch.randn(E, N, 4), torch.randn(E, 4, N // 2), torch.randn(E, H, 4)]
    leaves = [x.to(device).requires_grad_() for x in (hidden, weights, *factors)]
    loras = [kernel.Lora(*leaves[i : i + 2], 1.0) if adapted else None for i in (2, 4)]
    grad = torch.randn_like(hidden)

    def outcome() -> tuple:
        out = kernel.fused_experts(leaves[0], index, leaves[1], gate_up, down, "silu", *loras)
        return out, torch.autograd.grad(out, leaves if adapted else leaves[:2], grad)

    wanted_out, wanted = outcome()
    with poisoned_memory(device), kernel.for_gradients():
        out, grads = outcome()
    assert out.shape == wanted_out.shape and out.isnan().all()
    assert all(torch.equal(a, b) for a, b in zip(grads, wanted))
    again, _ = outcome()
    assert torch.equal(again, wanted_out)
