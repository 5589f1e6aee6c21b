"""4-bit experts at run time, at Qwen3-30B-A3B's widths: reruns, no host waits, CUDA graphs, memory."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Optional

import pytest
import torch

from ..adapted import Adapter, Quantization
from ..problems import Drawn, Problem
from ..steps import Step, assert_same_bits
from .runs import MIB, SLACK, capture, memory, no_host_waits
from .shapes import FEW_EXPERTS, real

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NF4, FP4 = Quantization(), Quantization("fp4", nested=False, blocksize=128)
ADAPTER = Adapter(16, 16, dtype=FP32)


@dataclass(frozen=True, repr=False)
class Call(Drawn):
    """A call of a layer with 16 experts, and the path that so many tokens take."""

    tokens: int
    path: str
    training: bool = True
    adapter: Optional[Adapter] = None

    def step(self, kernel, imbalance: str = "random", of: Optional[Step] = None) -> Step:
        problem = replace(FEW_EXPERTS, T=self.tokens, imbalance=imbalance)
        return Step(kernel, problem, "cuda", BF16, NF4, self.adapter, of=of)

    def run(self, step: Step) -> dict[str, torch.Tensor]:
        return step() if self.training else step.inference()


CALLS = [Call(3, "gemv", training=False), Call(3, "fast", training=False, adapter=ADAPTER)]
CALLS += [Call(160, "fast", training=False), Call(3000, "dequantize", training=False)]
CALLS += [Call(6, "fast"), Call(160, "fast"), Call(3000, "dequantize")]
CALLS += [replace(call, adapter=ADAPTER) for call in CALLS[-3:]]


@pytest.mark.parametrize("call", CALLS, ids=repr)
def test_the_host_never_waits(kernel, plans, forget, call):
    step = call.step(kernel)
    call.run(step)  # compiles and loads
    forget()
    with no_host_waits():
        for _ in range(3):  # by the code, recorded, replayed
            call.run(step)
    assert {plan.path for plan in plans} == {call.path}


@pytest.mark.parametrize("call", CALLS, ids=repr)
def test_a_captured_call_replays_with_new_inputs_and_new_routing(kernel, plans, forget, call):
    static = call.step(kernel)
    graph, results = capture(lambda: call.run(static))
    for imbalance in ("random", "one_takes_all", "some_skipped"):
        fresh = call.step(kernel, imbalance, of=static)
        static.become(fresh)
        graph.replay()
        forget()
        assert_same_bits(call.run(fresh), results)
    assert {plan.path for plan in plans} == {call.path}


@pytest.mark.parametrize("adapter", [None, ADAPTER], ids=repr)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("quantization", [NF4, FP4], ids=repr)
@pytest.mark.parametrize("tokens", [300, 4096])
def test_forty_runs_of_the_real_layer_are_one(kernel, plans, tokens, quantization, dtype, adapter):
    """Decoded in registers: a product still in flight when the next decode overwrites its operand would show here."""
    step = Step(kernel, real(tokens), "cuda", dtype, quantization, adapter)
    first = step()
    assert all(torch.isfinite(x).all() for x in first.values())
    for _ in range(40):
        assert_same_bits(first, step())
    assert {plan.path for plan in plans} == {"fast"}


@pytest.fixture(params=["by the code", "replayed"])
def before(request, forget) -> Callable[[], None]:
    """What makes the call that is measured such a one."""
    return forget if request.param == "by the code" else lambda: None


@pytest.mark.parametrize("training", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize(
    ("problem", "path", "scratch"),
    [(real(4096), "fast", 18), (real(16384), "dequantize", 64), (replace(real(1024), I=704), "dequantize", 511)],
    ids=repr,
)
def test_a_call_peaks_at_its_rows_and_so_many_mib_of_scratch(kernel, plans, before, problem, path, scratch, training):
    """Of the fast path the decoded scales, 2 bytes for 64 weights; else weights, the more where each has few rows."""
    step = Step(kernel, problem, "cuda", BF16, NF4)
    _, peak = memory(step if training else step.inference, before=before)
    assert {plan.path for plan in plans} == {path}
    assert peak <= rows_of(problem, path, training) + scratch * MIB + SLACK


def rows_of(problem: Problem, path: str, training: bool) -> int:
    """Bytes of what has a row for each token or slot where a call takes the most."""
    tokens, intermediate, slots = (
        2 * problem.T * columns for columns in (problem.H, problem.k * problem.I, problem.k * problem.H)
    )
    if path == "fast":
        slots //= 2  # half of the columns at a time
    if training:  # the output and the gradient of hidden_states, pre_activation and its gradient, partial sums
        return 2 * tokens + 2 * 2 * intermediate + slots + intermediate // 64
    permuted = tokens if path == "fast" else 0
    return tokens + permuted + intermediate + slots


@pytest.mark.parametrize("adapter", [None, ADAPTER], ids=repr)
def test_forward_and_backward_of_4096_tokens_take_less_than_700_mib(kernel, plans, before, adapter):
    problem = real(4096)
    step = Step(kernel, problem, "cuda", BF16, NF4, adapter)
    _, peak = memory(step, before=before)
    assert {plan.path for plan in plans} == {"fast"}
    pre_activation = 2 * problem.T * problem.k * 2 * problem.I
    assert 2 * pre_activation < peak < 700 * MIB, "and its gradient beside it"
