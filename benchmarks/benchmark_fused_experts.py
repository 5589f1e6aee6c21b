"""For ``kernels benchmark .``: the whole experts layer of Qwen3-30B-A3B, checked against a loop over the experts.

The runner times the reference once and by the wall clock, so the speedup it prints is a rough one; compare.py in the
same folder compares with real peers. It allows an absolute difference of 0.01, hence results well below one here, where
that is more than bf16's rounding and much less than the results.
"""

import torch
from kernels.benchmark import Benchmark
from torch.nn.functional import silu


def experts_loop(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj):
    """The definition of the layer, one expert at a time, rounded once."""
    out = torch.zeros_like(hidden_states, dtype=torch.float32)
    for expert in range(gate_up_proj.shape[0]):
        token, choice = (top_k_index == expert).nonzero(as_tuple=True)
        gate, up = (hidden_states[token] @ gate_up_proj[expert].t()).chunk(2, dim=-1)
        rows = (silu(gate) * up) @ down_proj[expert].t()
        out = out.index_add(0, token, rows.float() * top_k_weights[token, choice, None].float())
    return out.to(hidden_states.dtype)


class FusedExperts(Benchmark):
    """A token of decoding, a prompt, and a step of training with frozen experts; small sizes on a CPU."""

    seed = 0

    def setup(self, tokens: int = 4096) -> None:
        hidden, intermediate, experts, top_k = (2048, 768, 128, 8) if self.device == "cuda" else (64, 32, 8, 2)
        tokens = tokens if self.device == "cuda" else min(tokens, 64)
        options = {"device": self.device, "dtype": torch.bfloat16}
        scores, self.top_k_index = torch.randn(tokens, experts, device=self.device).softmax(-1).topk(top_k)
        self.top_k_weights = (scores / scores.sum(-1, keepdim=True)).bfloat16()
        self.hidden_states = torch.randn(tokens, hidden, **options)
        self.grad_output = torch.randn(tokens, hidden, **options)
        self.gate_up_proj = torch.randn(experts, 2 * intermediate, hidden, **options) / hidden**0.5
        self.down_proj = torch.randn(experts, hidden, intermediate, **options) / (4 * intermediate**0.5)

    def arguments(self) -> tuple:
        return self.hidden_states, self.top_k_index, self.top_k_weights, self.gate_up_proj, self.down_proj

    def setup_decode(self) -> None:
        self.setup(tokens=1)

    def benchmark_decode(self) -> None:
        self.out = self.kernel.fused_experts(*self.arguments())

    def verify_decode(self) -> torch.Tensor:
        return experts_loop(*self.arguments())

    benchmark_forward, verify_forward = benchmark_decode, verify_decode

    def setup_forward_backward(self) -> None:
        self.setup()
        self.hidden_states.requires_grad_()
        self.top_k_weights.requires_grad_()

    def grad_hidden_states(self, out: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(out, (self.hidden_states, self.top_k_weights), self.grad_output)[0]

    def benchmark_forward_backward(self) -> None:
        self.out = self.grad_hidden_states(self.kernel.fused_experts(*self.arguments()))

    def verify_forward_backward(self) -> torch.Tensor:
        return self.grad_hidden_states(experts_loop(*self.arguments()))
