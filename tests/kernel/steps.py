"""A layer as a model calls it: the public function on tensors that are drawn here, forward alone or with backward."""

from collections.abc import Iterator
from types import ModuleType
from typing import Optional

import torch

from .adapted import FACTORS, Adapter, Quantization
from .problems import Problem

Tensor = torch.Tensor


class Step:
    """A layer with fresh tokens and routing. Called, it gives its output and all gradients by name.

    ``trained`` are experts whose weights have gradients. ``of`` is a step whose experts this one shares; adapters,
    which an optimizer would change from step to step, are drawn anew.
    """

    def __init__(
        self,
        kernel: ModuleType,
        problem: Problem,
        device: str,
        dtype: torch.dtype,
        quantization: Optional[Quantization] = None,
        adapter: Optional[Adapter] = None,
        trained: bool = False,
        of: Optional["Step"] = None,
    ):
        self.kernel, self.adapter = kernel, adapter
        self.hidden_states, self.top_k_index, self.top_k_weights, *stacks, self.grad_output = problem.draw(
            device, dtype
        )
        quantize = quantization.quantize if quantization else lambda stack: stack
        self.experts = of.experts if of else [quantize(stack) for stack in stacks]
        self.stacks = [kernel.four_bit_weight(stack) for stack in self.experts] if quantization else self.experts
        self.factors = adapter.draw(problem, device, dtype) if adapter else {}
        self.leaves = {"hidden_states": self.hidden_states, "top_k_weights": self.top_k_weights, **self.factors}
        if trained:
            self.leaves |= dict(zip(("gate_up_proj", "down_proj"), self.stacks))
        for leaf in self.leaves.values():
            leaf.requires_grad_()

    def __call__(self) -> dict[str, Tensor]:
        out = self._forward()
        grads = torch.autograd.grad(out, [*self.leaves.values()], self.grad_output)
        return {"output": out.detach(), **{f"gradient of {name}": x for name, x in zip(self.leaves, grads)}}

    @torch.no_grad()
    def inference(self) -> dict[str, Tensor]:
        return {"output": self._forward()}

    @torch.no_grad()
    def become(self, other: "Step") -> None:
        """Copies the tokens, the routing and the adapters of a step with the same experts."""
        pairs = [(self.top_k_index, other.top_k_index), (self.grad_output, other.grad_output)]
        for mine, its in [*pairs, *zip(self.leaves.values(), other.leaves.values())]:
            mine.copy_(its)

    def _forward(self) -> Tensor:
        lora = {}
        if self.adapter:
            factors = [self.factors[name] for name in FACTORS]
            gate_up, down = (self.kernel.Lora(*factors[i : i + 2], self.adapter.scaling) for i in (0, 2))
            lora = {"gate_up_lora": gate_up, "down_lora": down}
        tokens = self.hidden_states, self.top_k_index, self.top_k_weights
        return self.kernel.fused_experts(*tokens, *self.stacks, **lora)


def assert_same_bits(expected: dict[str, Tensor], results: dict[str, Tensor]) -> None:
    """Of two steps. A NaN equals nothing."""
    assert expected.keys() == results.keys()
    for name, want in expected.items():
        assert torch.equal(want, results[name]), f"{name} differs"


def steps_of(tokens: int, kernel: ModuleType, problem: Problem, *settings: object) -> Iterator[Step]:
    """Steps of one layer, with at least so many tokens together."""
    first = None
    for _ in range(0, tokens, problem.T):
        step = Step(kernel, problem, *settings, of=first)
        first = first or step
        yield step
