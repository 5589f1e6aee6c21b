"""Each op against the oracle: result and gradients, from poisoned memory, whatever runs behind the public function."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Optional, TypeVar

import torch

from . import oracle
from .oracle import RATIO, assert_close
from .poison import poisoned_memory
from .problems import LinearProblem, Problem, lay_out
from .tables import assert_table_holds

Tensor = torch.Tensor
AnyProblem = TypeVar("AnyProblem", Problem, LinearProblem)
Layouts = Mapping[str, str]

CONTIGUOUS: Layouts = {}
"""Layouts map an argument's name (or "grad_output") to one of ``problems.LAYOUTS``; silence means contiguous."""

DIFFERENTIABLE = ("hidden_states", "top_k_weights", "gate_up_proj", "down_proj")


def assert_experts_agree(
    kernel: ModuleType,
    problem: Problem,
    device: str,
    dtype: torch.dtype,
    layouts: Layouts = CONTIGUOUS,
    trained: Collection[str] = DIFFERENTIABLE,
    weights_dtype: Optional[torch.dtype] = None,
) -> None:
    """``fused_experts`` and the gradients of its ``trained`` arguments are the oracle's."""
    problem = _without_cancellation(problem, layouts)
    _assert_agree(
        lambda *tensors: kernel.fused_experts(*tensors, problem.activation),
        lambda *tensors: oracle.experts(*tensors, problem.activation),
        problem.draw(device, dtype, weights_dtype)._asdict(),
        layouts,
        trained,
        problem.ratio(dtype),
    )


def assert_linear_agrees(
    kernel: ModuleType, problem: LinearProblem, device: str, dtype: torch.dtype, layouts: Layouts = CONTIGUOUS
) -> None:
    """``moe_fused_linear`` and its gradients are the oracle's."""
    problem = _without_cancellation(problem, layouts)
    inputs = problem.draw(device, dtype)._asdict()
    _assert_agree(kernel.moe_fused_linear, oracle.linear, inputs, layouts, ("input", "weight"), problem.ratio(dtype))


def assert_stray_id_is_skipped(kernel: ModuleType, problem: Problem, device: str, stray: int) -> None:
    """An id outside [0, E) counts as E, in the table, in the layer and in its gradients."""
    inputs = problem.draw(device, torch.float32)
    leaves = [tensor.requires_grad_() for tensor in (inputs.hidden_states, *inputs[2:-1])]
    results = []
    for id in (stray, problem.E):
        index = inputs.top_k_index.clone()
        index[4] = id
        assert_table_holds(kernel.routing(index, problem.E, 16), index, problem.E, 16)
        with poisoned_memory(device):
            out = kernel.fused_experts(leaves[0], index, *leaves[1:])
            results.append((out, *torch.autograd.grad(out, leaves, inputs.grad_output)))
    assert all(map(torch.equal, *results))
    assert not any(tensor[4].any() for tensor in results[0][:3]), "the skipped token's output and gradients"


def assert_rows_without_expert_are_zero(kernel: ModuleType, problem: LinearProblem, device: str, sizes: list) -> None:
    """Where ``sizes`` do not sum to M: rows behind the last expert are zero, and what is too much is left out."""
    input, weight, _, grad_output = problem.draw(device, torch.float32)
    input.requires_grad_()
    with poisoned_memory(device):
        out = kernel.moe_fused_linear(input, weight, torch.tensor(sizes, device=device))
        (grad,) = torch.autograd.grad(out, input, grad_output)
    expert = [e for e, size in enumerate(sizes) for _ in range(size)][: problem.M]
    rows, own = len(expert), weight[expert].double()
    ref = torch.einsum("bi,boi->bo", input.detach()[:rows].double(), own)
    assert_close("rows of experts", ref, out[:rows], RATIO[torch.float32])
    assert not out[rows:].any()
    ref = torch.einsum("bo,boi->bi", grad_output[:rows].double(), own)
    assert_close("gradients of rows of experts", ref, grad[:rows], RATIO[torch.float32])
    assert not grad[rows:].any()


def assert_sums_over_nothing_are_zero(kernel: ModuleType, sizes: Mapping[str, int], adapted: bool) -> None:
    """A layer with a size of 0 and its gradients, from poisoned memory."""
    T, k, E, H, I, r = ({"T": 3, "k": 2, "E": 4, "H": 6, "I": 5, "r": 2} | sizes).values()
    shapes = [(T, H), (T, k), (E, 2 * I, H), (E, H, I), (E, r, H), (E, 2 * I, r), (E, r, I), (E, H, r)]
    leaves = [torch.ones(shape, requires_grad=True) for shape in shapes[: 8 if adapted else 4]]
    (hidden, weights, *stacks), factors = leaves[:4], leaves[4:]
    loras = [kernel.Lora(*factors[i : i + 2]) for i in range(0, len(factors), 2)]
    index = torch.zeros(T, k, dtype=torch.int64)
    with poisoned_memory("cpu"):
        out = kernel.fused_experts(hidden, index, weights, *stacks, "silu", *loras)
        grads = torch.autograd.grad(out, leaves, torch.ones(T, H))
    for got, want in zip((out, *grads), (hidden, *leaves)):
        assert torch.equal(got, torch.zeros_like(want))


def _without_cancellation(problem: AnyProblem, layouts: Layouts) -> AnyProblem:
    """Positive if something is expanded: with all rows the same, few elements are left to be right or wrong."""
    return replace(problem, positive=problem.positive or "expanded" in layouts.values())


def _assert_agree(
    function: Callable[..., Tensor],
    expected: Callable[..., Tensor],
    inputs: dict[str, Tensor],
    layouts: Layouts,
    trained: Collection[str],
    ratio: float,
) -> None:
    inputs = {name: lay_out(tensor, layouts.get(name, "contiguous")) for name, tensor in inputs.items()}
    grad_output = inputs.pop("grad_output")
    leaves = {name: tensor.detach().requires_grad_(name in trained) for name, tensor in inputs.items()}
    with poisoned_memory(grad_output.device.type):
        out = function(*leaves.values())
        grads = torch.autograd.grad(out, [leaves[name] for name in trained], grad_output)
    ref, ref_grads = oracle.gradients(expected, inputs, trained, grad_output)
    assert out.dtype == grad_output.dtype
    assert_close("output", ref, out, ratio)
    for name, ref_grad, grad in zip(trained, ref_grads, grads):
        assert grad.dtype == inputs[name].dtype, f"the gradient of {name} is {grad.dtype}"
        assert_close(f"gradient of {name}", ref_grad, grad, ratio)
