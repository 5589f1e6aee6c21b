"""Stock's step by which errors are measured is right; and the error of the CPU backend, measured by it."""

import pytest
import torch

from . import oracle
from .adapted import Adapter, Quantization, decoded, product
from .oracle import RATIO, assert_close
from .problems import Problem
from .steps import Step, steps_of
from .stock import assert_within_stock, stock_step

SMALL = Problem(T=24, k=2, H=128, I=64)
ADAPTERS = [None, Adapter(16, 8)]
QUANTIZATIONS = [Quantization(), Quantization("fp4", nested=False)]


@pytest.mark.parametrize("adapter", ADAPTERS, ids=repr)
@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=repr)
def test_stock_is_the_oracle_in_fp64_and_near_it_in_16_bit(kernel, quantization, adapter):
    step = Step(kernel, SMALL, "cpu", torch.bfloat16, quantization, adapter)
    inputs = {name: x.detach() for name, x in step.leaves.items()}
    stacks = [decoded(stack, torch.float32).double() for stack in step.experts]

    def dense(hidden_states, top_k_weights, *factors):
        adapted = stacks
        if factors:
            A, B, down_A, down_B = factors
            pairs = ((A, B), (down_A, down_B))
            adapted = [stack + adapter.scaling * product(*pair) for stack, pair in zip(stacks, pairs)]
        return oracle.experts(hidden_states, step.top_k_index, top_k_weights, *adapted)

    out, grads = oracle.gradients(dense, inputs, tuple(inputs), step.grad_output)
    exact, rounded = (stock_step(step, dtype) for dtype in (torch.float64, torch.bfloat16))
    for name, want in {"output": out, **{f"gradient of {name}": x for name, x in zip(inputs, grads)}}.items():
        assert_close(name, want, exact[name], 1e-12)
        assert_close(name, want, rounded[name], RATIO[torch.bfloat16])
        assert not torch.equal(exact[name], rounded[name].double())


@pytest.mark.parametrize("adapter", ADAPTERS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=repr)
def test_on_a_cpu_a_training_step_is_as_near_to_fp64_as_stock(kernel, quantization, dtype, adapter, record_property):
    assert_within_stock(steps_of(96, kernel, SMALL, "cpu", dtype, quantization, adapter), record_property)


def test_an_error_above_stocks_is_noticed(kernel, record_property):
    step = Step(kernel, SMALL, "cpu", torch.bfloat16, Quantization())
    results = step()
    with torch.no_grad():
        results["gradient of top_k_weights"] *= 1.01
    step.__class__ = type("Worse", (Step,), {"__call__": lambda self: results})
    with pytest.raises(AssertionError, match="gradient of top_k_weights"):
        assert_within_stock([step], record_property)
