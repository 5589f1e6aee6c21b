"""Each op against the oracle: result and gradients, from poisoned memory, whatever runs behind the public function."""

from collections.abc import Callable, Collection, Mapping
from types import ModuleType
from typing import Optional

import torch

from . import oracle
from .oracle import RATIO, assert_close
from .poison import poisoned_memory
from .problems import LinearProblem, Problem, lay_out

Tensor = torch.Tensor
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
    _assert_agree(
        lambda *tensors: kernel.fused_experts(*tensors, problem.activation),
        lambda *tensors: oracle.experts(*tensors, problem.activation),
        problem.draw(device, dtype, weights_dtype)._asdict(),
        layouts,
        trained,
    )


def assert_linear_agrees(
    kernel: ModuleType, problem: LinearProblem, device: str, dtype: torch.dtype, layouts: Layouts = CONTIGUOUS
) -> None:
    """``moe_fused_linear`` and its gradients are the oracle's."""
    inputs = problem.draw(device, dtype)._asdict()
    _assert_agree(kernel.moe_fused_linear, oracle.linear, inputs, layouts, ("input", "weight"))


def _assert_agree(
    function: Callable[..., Tensor],
    expected: Callable[..., Tensor],
    inputs: dict[str, Tensor],
    layouts: Layouts,
    trained: Collection[str],
) -> None:
    inputs = {name: lay_out(tensor, layouts.get(name, "contiguous")) for name, tensor in inputs.items()}
    grad_output = inputs.pop("grad_output")
    leaves = {name: tensor.detach().requires_grad_(name in trained) for name, tensor in inputs.items()}
    with poisoned_memory(grad_output.device.type):
        out = function(*leaves.values())
        grads = torch.autograd.grad(out, [leaves[name] for name in trained], grad_output)
    ref, ref_grads = oracle.gradients(expected, inputs, trained, grad_output)
    assert out.dtype == grad_output.dtype
    assert_close("output", ref, out, RATIO[out.dtype])
    for name, ref_grad, grad in zip(trained, ref_grads, grads):
        assert grad.dtype == inputs[name].dtype, f"the gradient of {name} is {grad.dtype}"
        assert_close(f"gradient of {name}", ref_grad, grad, RATIO[out.dtype])
