"""What every implementation is asked to compute, on which inputs, and what the right answer is.

Three passes over one experts layer:

    forward   no gradients
    frozen    forward and backward, gradients of the hidden states and the routing weights
    trained   the same and the gradients of both expert weights
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Callable, NamedTuple

import torch
from torch import Tensor, nn

Layer = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden_states, top_k_index, top_k_weights -> (T, H)
PASSES = ("forward", "frozen", "trained")
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-4}  # relative errors above are wrong results


@dataclass(frozen=True)
class Shape:
    """The sizes of an experts layer; the default is a layer of Qwen3-30B-A3B."""

    hidden: int = 2048
    intermediate: int = 768
    experts: int = 128
    top_k: int = 8

    @property
    def expert_elements(self) -> int:
        """Weights of one expert: gate, up and down projection."""
        return 3 * self.intermediate * self.hidden

    def cost(
        self, which: str, tokens: int, active_experts: float, element_size: int, weight_size: float | None = None
    ) -> tuple[float, float]:
        """The operations a pass must do and the fewest bytes it must move: each input read, each output written once.

        Backward reads the weights a second time, as they do not stay in a cache until then; the gradient of the
        weights is written for every expert, with zeros for those that had no row. ``weight_size`` is the bytes of a
        weight, by default ``element_size``.
        """
        multiplies = tokens * self.top_k * self.expert_elements
        weights = active_experts * self.expert_elements * (weight_size or element_size) / element_size
        activations = 2 * tokens * self.hidden
        operations = {"forward": 2, "frozen": 4, "trained": 6}[which] * multiplies
        elements = {
            "forward": weights + activations,
            "frozen": 2 * (weights + activations),
            "trained": 2 * (weights + activations) + self.experts * self.expert_elements,
        }[which]
        return operations, elements * element_size


class Weights(NamedTuple):
    """gate_up_proj (E, 2I, H), gate rows first; down_proj (E, H, I)."""

    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter


class Inputs(NamedTuple):
    """hidden_states and grad_output (T, H); top_k_index int64 and top_k_weights (T, k), as a router gives them."""

    hidden_states: Tensor
    top_k_index: Tensor
    top_k_weights: Tensor
    grad_output: Tensor


def make_weights(shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> Weights:
    generator = torch.Generator(device).manual_seed(seed)

    def parameter(*size: int) -> nn.Parameter:
        weight = torch.empty(size, dtype=dtype, device=device)
        return nn.Parameter(weight.normal_(std=1 / math.sqrt(size[-1]), generator=generator))

    return Weights(
        parameter(shape.experts, 2 * shape.intermediate, shape.hidden),
        parameter(shape.experts, shape.hidden, shape.intermediate),
    )


def make_inputs(
    shape: Shape, tokens: int, dtype: torch.dtype, device: str, seed: int, imbalance: float = 0.5
) -> Inputs:
    """Tokens, and where a router sends them: each expert's logits share an offset of standard deviation ``imbalance``.

    At 0.5 an expert gets a few times its share or a fraction of it; at 4, 16 of 128 experts get nearly all.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device).normal_(generator=generator)

    logits = normal(tokens, shape.experts, dtype=torch.float32)
    logits += imbalance * normal(shape.experts, dtype=torch.float32)
    scores, index = logits.softmax(-1).topk(shape.top_k)
    top_k_weights = (scores / scores.sum(-1, keepdim=True)).to(dtype)
    hidden_states = normal(tokens, shape.hidden)
    return Inputs(hidden_states.requires_grad_(), index, top_k_weights.requires_grad_(), normal(tokens, shape.hidden))


def run_pass(layer: Layer, which: str, inputs: Inputs, weights: Weights) -> dict[str, Tensor]:
    """One pass. Gradients are returned, not accumulated, so no call leaves anything to the next.

    The expert weights must require gradients in the trained pass and in no other: :func:`train_weights`.
    """
    arguments = inputs.hidden_states, inputs.top_k_index, inputs.top_k_weights
    if which == "forward":
        with torch.no_grad():
            return {"out": layer(*arguments)}
    wanted = {"grad_hidden_states": inputs.hidden_states, "grad_top_k_weights": inputs.top_k_weights}
    if which == "trained":
        wanted |= {"grad_gate_up_proj": weights.gate_up_proj, "grad_down_proj": weights.down_proj}
    out = layer(*arguments)
    grads = torch.autograd.grad(out, list(wanted.values()), inputs.grad_output)
    return {"out": out.detach(), **dict(zip(wanted, grads))}


def train_weights(weights: Weights, trained: bool) -> None:
    for weight in weights:
        weight.requires_grad_(trained)


def reference(inputs: Inputs, weights: Weights, weight_grads: bool) -> dict[str, Tensor]:
    """Every result in fp64, one expert at a time; gradients of the weights are kept in fp32 to save memory."""
    hidden_states, top_k_index, top_k_weights, grad_output = (x.detach() for x in inputs)
    wide = {"dtype": torch.float64}
    results = {
        "out": torch.zeros_like(hidden_states, **wide),
        "grad_hidden_states": torch.zeros_like(hidden_states, **wide),
        "grad_top_k_weights": torch.zeros_like(top_k_weights, **wide),
    }
    if weight_grads:
        results["grad_gate_up_proj"] = torch.zeros_like(weights.gate_up_proj, dtype=torch.float32)
        results["grad_down_proj"] = torch.zeros_like(weights.down_proj, dtype=torch.float32)
    for expert in range(weights.gate_up_proj.shape[0]):
        token, choice = (top_k_index == expert).nonzero(as_tuple=True)
        sources = hidden_states[token], top_k_weights[token, choice], *(weight.detach()[expert] for weight in weights)
        x, scale, gate_up, down = (source.double().requires_grad_() for source in sources)
        with torch.enable_grad():
            gate, up = (x @ gate_up.t()).chunk(2, dim=-1)
            out = scale[:, None] * ((nn.functional.silu(gate) * up) @ down.t())
            grads = torch.autograd.grad(out, (x, scale, gate_up, down), grad_output[token].double())
        results["out"].index_add_(0, token, out.detach())
        results["grad_hidden_states"].index_add_(0, token, grads[0])
        results["grad_top_k_weights"][token, choice] = grads[1]
        if weight_grads:
            results["grad_gate_up_proj"][expert] = grads[2].float()
            results["grad_down_proj"][expert] = grads[3].float()
    return results


def relative_error(result: Tensor, wanted: Tensor) -> float:
    """norm(result - wanted) / norm(wanted), summed in fp64 a few rows at a time; NaN if either holds a NaN."""
    if result.shape != wanted.shape:
        raise ValueError(f"result must have shape {tuple(wanted.shape)}, got {tuple(result.shape)}")
    difference = norm = torch.zeros((), dtype=torch.float64, device=wanted.device)
    rows = max(1, wanted.shape[0] // 16)
    for ours, theirs in zip(result.split(rows), wanted.split(rows)):
        difference = difference + (ours.double() - theirs.double()).square().sum()
        norm = norm + theirs.double().square().sum()
    return (difference / norm).sqrt().item()
