"""Replayed calls on a card: the bits are those of the code, whatever tensors, streams and lengths come in between."""

import importlib
from dataclasses import replace

import pytest
import torch

from ..adapted import Adapter, Quantization
from ..problems import Problem
from ..steps import Step, assert_same_bits

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
PROBLEM = Problem(T=40, k=2, E=8, H=256, I=384)
KINDS = ["dense", "trained", "adapters", "4 bit", "4 bit with adapters"]


def _forget(kernel) -> None:
    importlib.import_module(f"{kernel.__name__}.form").forget()


def _step(kernel, kind: str, problem: Problem) -> Step:
    quantization = Quantization() if "4 bit" in kind else None
    adapter = Adapter(dtype=torch.float32) if "adapters" in kind else None
    return Step(kernel, problem, "cuda", BF16, quantization, adapter, trained=kind == "trained")


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
        assert_same_bits(results, step())
    assert replays.count(True) == 8, "forward and backward, from the third step on"


def test_lengths_take_turns(kernel, replays):
    steps = [_step(kernel, "4 bit with adapters", replace(PROBLEM, T=tokens)) for tokens in (1, 40, 41)]
    expected = [step() for step in steps]
    for _ in range(4):
        for step, results in zip(steps, expected):
            assert_same_bits(results, step())
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
    assert_same_bits(expected, results)
    assert replays == [True] * 4
