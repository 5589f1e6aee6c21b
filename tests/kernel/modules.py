"""Small modules with the attributes and signatures of Transformers' Qwen3-MoE, without Transformers."""

import torch
import torch.nn.functional as F
from torch import nn

from .problems import ExpertsInputs


class Router(nn.Module):
    """(logits, weights, index) of each token, as Qwen3MoeTopKRouter gives them."""

    def __init__(self, hidden: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, hidden))
        self.top_k = top_k

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = F.linear(hidden_states, self.weight)
        weights, index = logits.float().softmax(dim=-1).topk(self.top_k, dim=-1)
        return logits, (weights / weights.sum(dim=-1, keepdim=True)).to(logits.dtype), index


class Experts(nn.Module):
    """Holds what Qwen3MoeExperts holds; its own forward must never run where a kernel layer took its place."""

    def __init__(self, inputs: ExpertsInputs) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(inputs.gate_up_proj)
        self.down_proj = nn.Parameter(inputs.down_proj)
        self.act_fn = nn.SiLU()

    def forward(self, *_: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the module's own forward ran")


class Block(nn.Module):
    """Router and experts, as Qwen3MoeSparseMoeBlock."""

    def __init__(self, gate: nn.Module, experts: nn.Module) -> None:
        super().__init__()
        self.gate = gate
        self.experts = experts


def with_forward(module: nn.Module, layer: type) -> nn.Module:
    """``module`` with the forward of a kernel layer, put there as ``kernels.kernelize`` does."""
    module.forward = layer.forward.__get__(module)
    return module
