"""Layers whose weights are in 4 bit, or carry adapters, or both: drawn, and judged by the oracle on dense weights.

bitsandbytes quantizes and decodes here, so the package's own reading of its format is never its own judge. An adapter
enters the oracle as ``W + scaling * B @ A``, which the kernels never form.
"""

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Optional

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.nn import Params4bit

from . import oracle
from .oracle import assert_close
from .poison import poisoned_memory
from .problems import FEW, Drawn, Problem

Tensor = torch.Tensor
FACTORS = ("gate_up_A", "gate_up_B", "down_A", "down_B")


@dataclass(frozen=True, repr=False)
class Quantization(Drawn):
    """How bitsandbytes quantizes a stack of matrices."""

    quant_type: str = "nf4"
    blocksize: int = 64
    nested: bool = True

    def quantize(self, weight: Tensor) -> Params4bit:
        packed, state = bnb.quantize_4bit(
            weight.contiguous(),
            blocksize=self.blocksize,
            compress_statistics=self.nested,
            quant_type=self.quant_type,
        )
        return Params4bit(packed, requires_grad=False, quant_state=state, bnb_quantized=True)


@dataclass(frozen=True, repr=False)
class Adapter(Drawn):
    """The adapters of both projections; ``halves`` 2 gives gate and up an A each."""

    gate_up_rank: int = 4
    down_rank: int = 4
    halves: int = 1
    scaling: float = 0.5
    dtype: Optional[torch.dtype] = None

    def applied_to(self, problem: Problem) -> Problem:
        """The problem, drawn positive if the gradient of a factor has few elements."""
        smallest = min(self.gate_up_rank * min(problem.H, 2 * problem.I), self.down_rank * min(problem.H, problem.I))
        return replace(problem, positive=problem.positive or problem.experts_with_rows() * smallest < FEW)

    def draw(self, problem: Problem, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
        g = replace(problem, seed=None if problem.seed is None else problem.seed + 1).generator(device)
        E, H, I, dtype = problem.E, problem.H, problem.I, self.dtype or dtype
        return {
            "gate_up_A": problem.normal(g, dtype, E, self.halves * self.gate_up_rank, H, fan_in=H),
            "gate_up_B": problem.normal(g, dtype, E, 2 * I, self.gate_up_rank, fan_in=self.gate_up_rank),
            "down_A": problem.normal(g, dtype, E, self.down_rank, I, fan_in=I),
            "down_B": problem.normal(g, dtype, E, H, self.down_rank, fan_in=self.down_rank),
        }


def assert_adapted_experts_agree(
    kernel: ModuleType,
    problem: Problem,
    device: str,
    dtype: torch.dtype,
    quantization: Optional[Quantization] = None,
    adapter: Optional[Adapter] = None,
    trained: Optional[Collection[str]] = None,
    ratio: Optional[float] = None,
) -> None:
    """``fused_experts`` with 4-bit weights, adapters or both, and its gradients, are the oracle's."""
    problem = adapter.applied_to(problem) if adapter else problem
    inputs = problem.draw(device, dtype)._asdict()
    grad_output = inputs.pop("grad_output")
    factors = adapter.draw(problem, device, dtype) if adapter else {}
    stacks = {name: inputs[name] for name in ("gate_up_proj", "down_proj")}
    if quantization:
        packed = {name: quantization.quantize(stack) for name, stack in stacks.items()}
        inputs |= {name: decoded(p, torch.float32) for name, p in packed.items()}
        stacks = {name: kernel.four_bit_weight(p) for name, p in packed.items()}
    if trained is None:
        trained = ("hidden_states", "top_k_weights", *factors)
    scaling = adapter.scaling if adapter else 1.0

    leaves = {
        name: x.detach().clone().requires_grad_(name in trained)
        for name, x in (inputs | factors).items()
        if name not in stacks
    }
    with poisoned_memory(device):
        out = kernel.fused_experts(
            leaves["hidden_states"],
            leaves["top_k_index"],
            leaves["top_k_weights"],
            **stacks,
            activation=problem.activation,
            gate_up_lora=kernel.Lora(leaves["gate_up_A"], leaves["gate_up_B"], scaling) if adapter else None,
            down_lora=kernel.Lora(leaves["down_A"], leaves["down_B"], scaling) if adapter else None,
        )
        grads = torch.autograd.grad(out, [leaves[name] for name in trained], grad_output)

    def dense(hidden, index, weights, gate_up_proj, down_proj, *factors):
        if factors:
            gate_up_A, gate_up_B, down_A, down_B = factors
            gate_up_proj = gate_up_proj + scaling * product(gate_up_A, gate_up_B)
            down_proj = down_proj + scaling * product(down_A, down_B)
        return oracle.experts(hidden, index, weights, gate_up_proj, down_proj, problem.activation)

    ref, ref_grads = oracle.gradients(dense, inputs | factors, trained, grad_output)
    ratio = ratio or problem.ratio(dtype)
    assert out.dtype == dtype
    assert_close("output", ref, out, ratio)
    for name, ref_grad, grad in zip(trained, ref_grads, grads):
        assert grad.dtype == leaves[name].dtype, f"the gradient of {name} is {grad.dtype}"
        assert_close(f"gradient of {name}", ref_grad, grad, ratio)


def decoded(parameter: Params4bit, dtype: torch.dtype) -> Tensor:
    """What bitsandbytes makes of the parameter. Asked for one long row: on a CPU it loses count where a block goes on
    from one row into the next."""
    state = copy.copy(parameter.quant_state)
    state.shape, state.dtype = (parameter.quant_state.shape.numel(),), dtype
    return bnb.dequantize_4bit(parameter.data.view(torch.uint8), state).view(parameter.quant_state.shape)


def assert_decodes_to(ours: Tensor, parameter: Params4bit, theirs: Tensor) -> None:
    """Bit for bit, but for FP4's nibble 8. The codebook has 0.0 for it; some of bitsandbytes' code gives -0.0: CUDA's,
    and on a CPU, by what it can, that for all blocks or for a last one which is not whole."""
    assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    if parameter.quant_state.quant_type == "fp4":
        packed = parameter.data.flatten().view(torch.uint8)
        eights = torch.stack((packed >> 4, packed & 15), -1).view(ours.shape) == 8
        ours, theirs = (x.masked_fill(eights, 0.0) for x in (ours, theirs))
    assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def every_byte(quant_type: str, nested: bool, device: str = "cpu") -> Params4bit:
    """All 256 bytes, and so each nibble in both places, under each of many scales: the 256 codes of quantized ones, at
    nested scales from tiny to large; or 0 and, subnormal to huge, a plain one for each exponent of fp32."""
    state = Quantization(quant_type, 512, nested).quantize(torch.randn(4, 256, 512, device=device)).quant_state
    if nested:
        state.absmax = torch.arange(256, dtype=torch.uint8, device=device).repeat(4)
        state.state2.absmax = torch.tensor([1e-6, 0.03, 1.7, 900.0], device=device)
    else:
        powers = 1.7 * 2.0 ** torch.arange(-149, 128, dtype=torch.float64, device=device)
        state.absmax = torch.cat((powers.new_zeros(1), powers)).float().repeat(4)[:1024]
    packed = torch.arange(256, dtype=torch.uint8, device=device).repeat(1024)[:, None]
    return Params4bit(packed, requires_grad=False, quant_state=state, bnb_quantized=True)


def product(A: Tensor, B: Tensor) -> Tensor:
    """(E, N, K): B @ A, each half of B's rows with its own A if A is twice as high as B is wide."""
    halves = A.shape[1] // B.shape[2]
    return torch.cat([b @ a for a, b in zip(A.chunk(halves, 1), B.chunk(halves, 1))], dim=1)


class AdaptedLayer:
    """A layer's tensors, run by functions with the arguments of ``kernels.experts``; ``types`` holds Gradients, Lora,
    Projection and four_bit_weight. So dropout, whose seed the public function draws, can be that of another run or
    backend."""

    def __init__(
        self,
        types: object,
        problem: Problem,
        adapter: Adapter,
        dtype: torch.dtype = torch.float32,
        dropout: float = 0.0,
        device: str = "cpu",
        quantization: Optional[Quantization] = None,
    ):
        self.types, self.adapter, self.dropout = types, adapter, dropout
        self.inputs = problem.draw(device, dtype)
        if quantization:
            stacks = self.inputs.gate_up_proj, self.inputs.down_proj
            gate_up, down = (types.four_bit_weight(quantization.quantize(stack)) for stack in stacks)
            self.inputs = self.inputs._replace(gate_up_proj=gate_up, down_proj=down)
        self.factors = adapter.draw(problem, device, dtype)
        self.seed = torch.randint(2**31, (1,), device=device) if dropout else None

    def run(self, forward: Callable, backward: Callable) -> dict[str, Tensor]:
        """The output and all gradients by name."""
        out, *saved = self.forward(forward)
        asked = [True, True, False, False, *(name in self.factors for name in FACTORS)]
        grads = self.backward(backward, saved, self.types.Gradients(*asked))
        return {"output": out, **{name: grad for name, grad, want in zip(grads._fields, grads, asked) if want}}

    def pairs(self, expected: dict[str, Tensor], forward: Callable, backward: Callable) -> list[tuple]:
        """(name, expected, what the functions give)."""
        with poisoned_memory(self.inputs[0].device.type):
            results = self.run(forward, backward)
        assert results.keys() == expected.keys()
        return [(name, expected[name], results[name]) for name in expected]

    def forward(self, function: Callable, save: bool = True) -> tuple[Tensor, ...]:
        return function(*self._arguments(), self.seed, "silu", save)

    def backward(self, function: Callable, saved: tuple[Tensor, ...], wanted: tuple) -> tuple[Tensor, ...]:
        return function(self.inputs.grad_output, *self._arguments(), self.seed, tuple(saved), "silu", wanted)

    def _arguments(self):
        *tokens, gate_up, down, _ = self.inputs
        return *tokens, self._projection(gate_up, "gate_up"), self._projection(down, "down")

    def _projection(self, weight: Tensor, name: str):
        if f"{name}_A" not in self.factors:
            return self.types.Projection(weight)
        factors = self.factors[f"{name}_A"], self.factors[f"{name}_B"]
        lora = self.types.Lora(*factors, self.adapter.scaling, self.dropout)
        return self.types.Projection(weight, lora)
