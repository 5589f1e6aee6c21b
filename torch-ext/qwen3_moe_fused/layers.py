"""Kernel layers: stateless forwards that ``kernels.kernelize`` puts in the place of Transformers' own."""

import torch
from torch import nn

from .experts import fused_experts
from .weights import expert_weights, is_wrapped


class Qwen3MoeExperts(nn.Module):
    """The experts of Qwen3-MoE, and of every Transformers model whose experts hold the same tensors."""

    can_torch_compile = True
    has_backward = True

    gate_up_proj: torch.Tensor
    down_proj: torch.Tensor

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        return _run(self, hidden_states, top_k_index, top_k_weights)


class Qwen3MoeSparseMoeBlock(nn.Module):
    """Router and experts of Qwen3-MoE.

    The router is called as a module, so hooks on it still record its logits. Experts that are wrapped (PEFT,
    sharding) are called as a module too, and their own forward decides how they run.
    """

    can_torch_compile = True
    has_backward = True

    gate: nn.Module
    experts: nn.Module

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, top_k_weights, top_k_index = self.gate(tokens)
        if is_wrapped(self.experts):
            out = self.experts(tokens, top_k_index, top_k_weights)
        else:
            out = _run(self.experts, tokens, top_k_index, top_k_weights)
        return out.reshape(hidden_states.shape)


def _run(
    experts: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Computes in ``ExpertWeights.dtype`` and returns that of ``hidden_states``, as Transformers' experts do."""
    weights = expert_weights(experts)
    tokens = hidden_states.to(weights.dtype)
    return fused_experts(tokens, top_k_index, top_k_weights, *weights).to(hidden_states.dtype)
