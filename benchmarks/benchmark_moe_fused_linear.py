"""For ``kernels benchmark .``: one grouped linear layer, checked against a product for each expert.

Sizes are those of gate_up in Qwen3-30B-A3B at 4096 tokens, with rows drawn unevenly over the experts. All results
are scaled to about a tenth: the runner allows an absolute difference of 0.01.
"""

import torch
from kernels.benchmark import Benchmark


class MoeFusedLinear(Benchmark):
    """The product, its gradient for the input, and its gradient for the weight; small sizes on a CPU."""

    seed = 0

    def setup(self, grad_scale: float = 1.0) -> None:
        rows, out, width, experts = (32768, 1536, 2048, 128) if self.device == "cuda" else (64, 48, 64, 8)
        options = {"device": self.device, "dtype": torch.bfloat16}
        chosen = (torch.rand(rows, device=self.device) ** 1.5 * experts).long()
        self.m_sizes = torch.bincount(chosen, minlength=experts)
        self.sizes = self.m_sizes.tolist()
        self.input = torch.randn(rows, width, **options).requires_grad_()
        self.weight = (torch.randn(experts, out, width, **options) / (8 * width**0.5)).requires_grad_()
        self.grad_output = torch.randn(rows, out, **options) * grad_scale

    def loop(self) -> torch.Tensor:
        rows = self.input.split(self.sizes)
        return torch.cat([x @ w.t() for x, w in zip(rows, self.weight)])

    def grad(self, out: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(out, of, self.grad_output)[0]

    def fused(self) -> torch.Tensor:
        return self.kernel.moe_fused_linear(self.input, self.weight, self.m_sizes)

    def benchmark_forward(self) -> None:
        with torch.no_grad():
            self.out = self.fused()

    def verify_forward(self) -> torch.Tensor:
        with torch.no_grad():
            return self.loop()

    def benchmark_input_gradient(self) -> None:
        self.out = self.grad(self.fused(), self.input)

    def verify_input_gradient(self) -> torch.Tensor:
        return self.grad(self.loop(), self.input)

    def setup_weight_gradient(self) -> None:
        self.setup(grad_scale=1 / 256)

    def benchmark_weight_gradient(self) -> None:
        self.out = self.grad(self.fused(), self.weight)

    def verify_weight_gradient(self) -> torch.Tensor:
        return self.grad(self.loop(), self.weight)
