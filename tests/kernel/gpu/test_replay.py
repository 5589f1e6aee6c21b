"""Replayed calls on a card: the bits are those of the code, whatever tensors, streams and lengths come in between."""

import importlib
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from ..adapted import FACTORS, Adapter, Quantization
from ..problems import Problem

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
PROBLEM = Problem(T=40, k=2, E=8, H=256, I=384)
KINDS = ["dense", "trained", "adapters", "4 bit", "4 bit with adapters"]


def _forget(kernel) -> None:
    importlib.import_module(f"{kernel.__name__}.form").forget()


def _step(kernel, kind: str, problem: Problem) -> Callable[[], list[torch.Tensor]]:
    """Of a layer that is drawn here: output and gradients."""
    inputs = problem.draw("cuda", BF16)
    hidden, weights = (x.requires_grad_() for x in (inputs.hidden_states, inputs.top_k_weights))
    stacks, leaves, lora = [inputs.gate_up_proj, inputs.down_proj], [hidden, weights], {}
    if kind == "trained":
        leaves += [stack.requires_grad_() for stack in stacks]
    if "4 bit" in kind:
        stacks = [kernel.four_bit_weight(Quantization().quantize(stack)) for stack in stacks]
    if "adapters" in kind:
        factors = Adapter(dtype=torch.float32).draw(problem, "cuda", BF16)
        A, B, down_A, down_B = trained = [factors[name].requires_grad_() for name in FACTORS]
        lora = {"gate_up_lora": kernel.Lora(A, B, 2.0), "down_lora": kernel.Lora(down_A, down_B, 0.5)}
        leaves += trained

    def step() -> list[torch.Tensor]:
        out = kernel.fused_experts(hidden, inputs.top_k_index, weights, *stacks, **lora)
        return [out.detach(), *torch.autograd.grad(out, leaves, inputs.grad_output)]

    return step


@pytest.mark.parametrize("tokens", [1, 40, 520, 6000])
@pytest.mark.parametrize("kind", KINDS)
def test_replayed_steps_are_the_same_bits(kernel, replays, kind, tokens, monkeypatch):
    """With 520 tokens weights are read by descriptors. With 6000 the second product is in halves, and 4-bit weights are
    decoded in parts."""
    regime = importlib.import_module(f"{kernel.__name__}.regime")
    if tokens == 6000:
        monkeypatch.setattr(regime, "WINDOW", 0)
        monkeypatch.setattr(regime, "SCRATCH", 0)
    problem = replace(PROBLEM, T=tokens)
    steps = [
        _step(kernel, kind, replace(problem, imbalance=how)) for how in ("random", "one_takes_all", "some_skipped")
    ]
    expected = []
    for step in steps:
        _forget(kernel)
        expected.append(step())
    _forget(kernel)
    for step, results in [*zip(steps, expected)] * 2:
        assert all(map(torch.equal, results, step()))
    assert replays.count(True) == 8, "forward and backward, from the third step on"


def test_lengths_take_turns(kernel, replays):
    steps = [_step(kernel, "4 bit with adapters", replace(PROBLEM, T=tokens)) for tokens in (1, 40, 41)]
    expected = [step() for step in steps]
    for _ in range(4):
        for step, results in zip(steps, expected):
            assert all(map(torch.equal, results, step()))
    assert replays == [True] * 18


def test_a_replayed_step_on_a_side_stream_waits_for_that_stream(kernel, replays):
    step = _step(kernel, "adapters", PROBLEM)
    expected = [step() for _ in range(3)][-1]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        results = step()
    torch.cuda.current_stream().wait_stream(side)
    assert all(map(torch.equal, expected, results)) and replays == [True] * 4
