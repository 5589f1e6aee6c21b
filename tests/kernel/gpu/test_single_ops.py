"""routing and moe_fused_linear by themselves: captured once and replayed with what is new, without the host waiting."""

from dataclasses import replace

import pytest
import torch

from .. import oracle
from ..oracle import assert_close
from ..poison import POISON
from ..problems import BALANCES, SKIPPING, LinearInputs, LinearProblem
from ..tables import assert_table_holds
from .runs import capture, copy_in, no_host_waits
from .shapes import ODD_LINEAR, REAL, real

pytestmark = pytest.mark.gpu

LINEAR = [
    ODD_LINEAR,
    LinearProblem(M=2000, N=256, K=192, E=8),  # enough rows per expert for the largest tiles
]
TOKENS = [1, 300, 4096]  # up to 2048 slots, and more: by fewer lanes and by more


def _step(kernel, inputs: LinearInputs) -> tuple[torch.Tensor, ...]:
    """Output, and the gradients of input and weight."""
    out = kernel.moe_fused_linear(*inputs[:3])
    return out.detach(), *torch.autograd.grad(out, inputs[:2], inputs.grad_output)


def _draw(problem: LinearProblem, dtype: torch.dtype) -> LinearInputs:
    input, weight, *rest = problem.draw("cuda", dtype)
    return LinearInputs(input.requires_grad_(), weight.requires_grad_(), *rest)


def _draws(problem: LinearProblem, dtype: torch.dtype) -> list[LinearInputs]:
    """With every balance; and with sizes that leave rows behind the last expert, as sentinels do."""
    every = [_draw(replace(problem, imbalance=imbalance), dtype) for imbalance in BALANCES]
    return [*every, every[0]._replace(m_sizes=every[0].m_sizes // 2)]


@pytest.mark.parametrize("problem", LINEAR, ids=repr)
def test_a_captured_linear_step_replays_with_new_inputs_and_new_sizes(kernel, problem, dtype):
    inputs = _draw(problem, dtype)
    graph, results = capture(lambda: _step(kernel, inputs))
    for fresh in _draws(problem, dtype):
        with torch.no_grad():
            copy_in(inputs, fresh)
        copy_in(results, [torch.full_like(result, torch.nan) for result in results])
        graph.replay()
        arguments = {name: x.detach() for name, x in fresh._asdict().items()}
        grad_output = arguments.pop("grad_output")
        ref, grads = oracle.gradients(oracle.linear, arguments, ("input", "weight"), grad_output)
        names = "output", "gradient of input", "gradient of weight"
        for name, want, got in zip(names, (ref, *grads), results):
            assert_close(name, want, got, problem.ratio(dtype))
        assert all(map(torch.equal, results, _step(kernel, fresh)))


@pytest.mark.parametrize("problem", LINEAR, ids=repr)
def test_a_linear_step_never_waits_for_the_device(kernel, problem, dtype):
    draws = _draws(problem, dtype)
    _step(kernel, draws[0])  # compiles and loads
    with no_host_waits():
        for inputs in draws:
            _step(kernel, inputs)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
def test_captured_routing_replays_with_new_ids_and_new_slots_to_skip(kernel, tokens, index_dtype):
    problem = real(tokens)
    index = problem.draw_index("cuda").to(index_dtype)
    graph, table = capture(lambda: kernel.routing(index, problem.E, 64))
    for imbalance in (*SKIPPING, *BALANCES):
        fresh = replace(problem, imbalance=imbalance).draw_index("cuda").to(index_dtype)
        index.copy_(fresh)
        copy_in(table, [torch.full_like(tensor, POISON) for tensor in table])
        graph.replay()
        assert_table_holds(table, fresh, problem.E, 64)
        assert all(map(torch.equal, table, kernel.routing(fresh, problem.E, 64)))


@pytest.mark.parametrize("tokens", TOKENS)
def test_routing_never_waits_for_the_device(kernel, tokens):
    draws = [replace(real(tokens), imbalance=imbalance).draw_index("cuda") for imbalance in BALANCES + SKIPPING]
    kernel.routing(draws[0], REAL.E)  # compiles and loads
    with no_host_waits():
        for index in draws:
            kernel.routing(index, REAL.E)
