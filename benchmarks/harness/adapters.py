"""The layer with an adapter on each expert's projections: factors, the right answer, and the ways to compute it."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .problem import Inputs, Shape, Weights
from .routing import sort_and_histc

Layer = Callable[[Inputs], Tensor]


class Factors(NamedTuple):
    """A (E, r, K) and B (E, N, r) of both projections; gate_up_A (E, 2r, H) if gate and up have an A each."""

    gate_up_A: Tensor
    gate_up_B: Tensor
    down_A: Tensor
    down_B: Tensor


def make_factors(shape: Shape, rank: int, dtype: torch.dtype, device: str, seed: int = 0, halves: int = 1) -> Factors:
    """``halves`` 2 gives gate and up an A each."""
    generator = torch.Generator(device).manual_seed(seed)

    def factor(*size: int) -> nn.Parameter:
        values = torch.empty(shape.experts, *size, device=device).normal_(generator=generator)
        return nn.Parameter((values / math.sqrt(size[-1])).to(dtype))

    return Factors(
        factor(halves * rank, shape.hidden),
        factor(2 * shape.intermediate, rank),
        factor(rank, shape.intermediate),
        factor(shape.hidden, rank),
    )


def as_peft_stores_them(factors: Factors) -> Factors:
    """The same numbers in fp32, B with experts fastest: what PEFT trains and hands over as a view."""
    wide = factors._asdict()
    for name, factor in wide.items():
        wide[name] = factor.detach().float()
        if name.endswith("B"):
            wide[name] = wide[name].permute(1, 2, 0).contiguous().permute(2, 0, 1)
        wide[name].requires_grad_()
    return Factors(**wide)


def ours(kernel: ModuleType, weights: tuple, factors: Factors | None, scaling: float) -> Layer:
    """The kernel, with adapters or without."""
    loras = {}
    if factors:
        loras["gate_up_lora"] = kernel.Lora(factors.gate_up_A, factors.gate_up_B, scaling)
        loras["down_lora"] = kernel.Lora(factors.down_A, factors.down_B, scaling)

    def layer(inputs: Inputs) -> Tensor:
        hidden_states, top_k_index, top_k_weights, _ = inputs
        return kernel.fused_experts(hidden_states, top_k_index, top_k_weights, *weights, **loras)

    return layer


def split(weights: Weights, factors: Factors | None, scaling: float) -> Layer:
    """PyTorch's grouped_mm for each matrix by itself, as Transformers computes the layer and others add adapters."""

    def project(x: Tensor, weight: Tensor, A: Tensor | None, B: Tensor | None, ends: Tensor) -> Tensor:
        out = F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
        if A is None:
            return out
        low_rank = F.grouped_mm(x, A.transpose(1, 2), offs=ends)
        return out + scaling * F.grouped_mm(low_rank, B.transpose(1, 2), offs=ends)

    def layer(inputs: Inputs) -> Tensor:
        hidden_states, top_k_index, top_k_weights, _ = inputs
        tokens, k = top_k_index.shape
        order, _, ends = sort_and_histc(top_k_index, weights.down_proj.shape[0])
        gate_up_A, gate_up_B, down_A, down_B = factors or (None,) * 4
        both = project(hidden_states[order // k], weights.gate_up_proj, gate_up_A, gate_up_B, ends)
        gate, up = both.chunk(2, dim=-1)
        out = project(F.silu(gate) * up, weights.down_proj, down_A, down_B, ends)
        out = out * top_k_weights.reshape(-1)[order, None]
        slots = torch.empty_like(order)
        slots[order] = torch.arange(order.numel(), device=order.device)
        return out[slots].view(tokens, k, -1).sum(1)

    return layer


def run(layer: Layer, inputs: Inputs, factors: Factors | None) -> dict[str, Tensor]:
    """Forward and backward: the output and the gradients of hidden states, routing weights and factors."""
    wanted = {"grad_hidden_states": inputs.hidden_states, "grad_top_k_weights": inputs.top_k_weights}
    wanted |= {f"grad_{name}": factor for name, factor in (factors._asdict() if factors else {}).items()}
    out = layer(inputs)
    grads = torch.autograd.grad(out, list(wanted.values()), inputs.grad_output)
    return {"out": out.detach(), **dict(zip(wanted, grads))}


def reference(inputs: Inputs, weights: Weights, factors: Factors | None, scaling: float) -> dict[str, Tensor]:
    """Every result in fp64, one expert at a time."""
    hidden_states, top_k_index, top_k_weights, grad_output = (x.detach() for x in inputs)
    results = {
        "out": torch.zeros_like(hidden_states, dtype=torch.float64),
        "grad_hidden_states": torch.zeros_like(hidden_states, dtype=torch.float64),
        "grad_top_k_weights": torch.zeros_like(top_k_weights, dtype=torch.float64),
    }
    names = list(factors._asdict()) if factors else []
    results |= {f"grad_{name}": torch.zeros_like(f, dtype=torch.float64) for name, f in zip(names, factors or ())}
    for expert in range(weights.gate_up_proj.shape[0]):
        token, choice = (top_k_index == expert).nonzero(as_tuple=True)
        leaves = [hidden_states[token], top_k_weights[token, choice], *(f.detach()[expert] for f in factors or ())]
        x, scale, *own = (leaf.double().requires_grad_() for leaf in leaves)
        gate_up, down = (weight.detach()[expert].double() for weight in weights)
        if own:
            gate_up, down = gate_up + scaling * _product(*own[:2]), down + scaling * _product(*own[2:])
        gate, up = (x @ gate_up.t()).chunk(2, dim=-1)
        out = scale[:, None] * ((F.silu(gate) * up) @ down.t())
        grads = torch.autograd.grad(out, (x, scale, *own), grad_output[token].double())
        results["out"].index_add_(0, token, out.detach())
        results["grad_hidden_states"].index_add_(0, token, grads[0])
        results["grad_top_k_weights"][token, choice] = grads[1]
        for name, grad in zip(names, grads[2:]):
            results[f"grad_{name}"][expert] = grad
    return results


def _product(A: Tensor, B: Tensor) -> Tensor:
    """(N, K): B @ A of one expert, each half of B's rows with its own A if A is twice as high as B is wide."""
    halves = A.shape[0] // B.shape[1]
    return torch.cat([b @ a for a, b in zip(A.chunk(halves), B.chunk(halves))])
