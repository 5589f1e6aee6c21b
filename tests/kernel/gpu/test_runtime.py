"""How the ops behave on a CUDA device: reruns, streams, no host waits, CUDA graphs, memory."""

import importlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from ..problems import ExpertsInputs
from .runs import SLACK, capture, copy_in, memory, no_host_waits
from .shapes import ODD_LINEAR, REAL, real

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16


def _leaves(inputs: ExpertsInputs, trained: bool = True) -> list[torch.Tensor]:
    """The arguments of fused_experts; the experts' weights require gradients only if ``trained``."""
    hidden, index, weights, gate_up, down = (x.detach() for x in inputs[:-1])
    hidden.requires_grad_()
    weights.requires_grad_()
    return [hidden, index, weights, gate_up.requires_grad_(trained), down.requires_grad_(trained)]


def _step(kernel, arguments: list[torch.Tensor], grad_output: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Output and gradients."""
    out = kernel.fused_experts(*arguments)
    return out, *torch.autograd.grad(out, [x for x in arguments if x.requires_grad], grad_output)


def test_forty_reruns_are_bit_identical(kernel):
    inputs = REAL.draw("cuda", BF16)
    arguments = _leaves(inputs)
    first = _step(kernel, arguments, inputs.grad_output)
    for _ in range(40):
        assert all(map(torch.equal, first, _step(kernel, arguments, inputs.grad_output)))


def test_a_side_stream_gives_the_same(kernel):
    inputs = REAL.draw("cuda", BF16)
    arguments = _leaves(inputs, trained=False)
    expected = _step(kernel, arguments, inputs.grad_output)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # whoever does not wait for this stream reads before it is done
        late = [x.detach().clone().requires_grad_(x.requires_grad) for x in arguments]
        results = _step(kernel, late, inputs.grad_output)
    torch.cuda.current_stream().wait_stream(side)
    assert all(map(torch.equal, expected, results))


def test_the_host_never_waits_for_the_device(kernel):
    inputs, linear = REAL.draw("cuda", BF16), ODD_LINEAR.draw("cuda", BF16)
    arguments = _leaves(inputs)
    input, weight = linear.input.requires_grad_(), linear.weight.requires_grad_()

    def everything() -> None:
        kernel.routing(inputs.top_k_index, REAL.E)
        _step(kernel, arguments, inputs.grad_output)
        torch.autograd.grad(kernel.moe_fused_linear(input, weight, linear.m_sizes), (input, weight), linear.grad_output)

    everything()  # compiles and loads
    with no_host_waits():
        everything()


@pytest.mark.parametrize("tokens", [1, 300])
def test_a_captured_forward_replays_with_new_inputs_and_new_routing(kernel, tokens):
    inputs = real(tokens).draw("cuda", BF16)
    with torch.no_grad():
        graph, out = capture(lambda: kernel.fused_experts(*inputs[:-1]))
        for imbalance in ("random", "one_takes_all", "some_skipped"):
            fresh = replace(real(tokens), imbalance=imbalance).draw("cuda", BF16)
            copy_in(inputs, fresh)
            graph.replay()
            assert torch.equal(out, kernel.fused_experts(*fresh[:-1]))


@pytest.fixture(params=[False, True], ids=["whole", "halves"])
def second_product(kernel, monkeypatch, request) -> Iterator[None]:
    """Whole or in halves. No call of another test is replayed, and none of this one's in others."""
    regime, form = (importlib.import_module(f"{kernel.__name__}.{name}") for name in ("regime", "form"))
    if request.param:
        monkeypatch.setattr(regime, "WINDOW", 0)
    form.forget()
    yield
    form.forget()


@pytest.mark.usefixtures("second_product")
def test_a_captured_training_step_replays_with_new_inputs_and_new_routing(kernel):
    inputs = REAL.draw("cuda", BF16)
    arguments = _leaves(inputs)
    graph, results = capture(lambda: _step(kernel, arguments, inputs.grad_output))
    for imbalance in ("random", "one_takes_all", "some_skipped"):
        fresh = replace(REAL, imbalance=imbalance).draw("cuda", BF16)
        with torch.no_grad():
            copy_in([*arguments, inputs.grad_output], fresh)
        graph.replay()
        assert all(map(torch.equal, results, _step(kernel, _leaves(fresh), fresh.grad_output)))


def test_inference_peaks_at_its_intermediate_and_half_of_the_slots(kernel):
    problem = real(4096)
    inputs = problem.draw("cuda", BF16)
    slots = problem.T * problem.k
    with torch.no_grad():
        _, peak = memory(lambda: kernel.fused_experts(*inputs[:-1]))
    assert peak <= 2 * (slots * problem.I + slots * problem.H // 2 + problem.T * problem.H) + SLACK


def test_training_frozen_experts_keeps_and_peaks_at_what_it_says(kernel):
    problem = real(4096)
    inputs = problem.draw("cuda", BF16)
    arguments = _leaves(inputs, trained=False)
    slots, tokens = problem.T * problem.k, problem.T * problem.H
    outputs: list[torch.Tensor] = []

    kept, peak = memory(lambda: outputs.append(kernel.fused_experts(*arguments)), outputs.clear)
    pre_activation, slot_rows = slots * 2 * problem.I, slots * problem.H // 2
    assert kept <= 2 * (tokens + pre_activation) + SLACK, "more is kept for backward than the pre-activation"
    assert peak <= 2 * (tokens + pre_activation + slots * problem.I + slot_rows) + SLACK

    out = kernel.fused_experts(*arguments)
    leaves = [x for x in arguments if x.requires_grad]
    _, peak = memory(lambda: torch.autograd.grad(out, leaves, inputs.grad_output, retain_graph=True))
    assert peak <= 2 * (pre_activation + slot_rows + tokens) + SLACK, "backward of frozen experts"


def test_training_experts_adds_their_gradients(kernel):
    """The last and largest comes when what the others needed is gone, but for the gradient of the pre-activation."""
    problem = real(4096)
    inputs = problem.draw("cuda", BF16)
    arguments = _leaves(inputs)
    out = kernel.fused_experts(*arguments)
    leaves = [x for x in arguments if x.requires_grad]
    _, peak = memory(lambda: torch.autograd.grad(out, leaves, inputs.grad_output, retain_graph=True))
    gradients = sum(x.numel() for x in leaves)
    assert peak <= 2 * (gradients + problem.T * problem.k * 2 * problem.I) + SLACK
