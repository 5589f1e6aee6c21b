"""The experts layer of this project, computed by the build of the kernel that kernels.lock names."""

from pathlib import Path

import torch
from kernels import get_locked_kernel

REPO = "org/qwen3-moe-fused"
LOCKFILE = Path(__file__).with_name("kernels.lock")

kernel = get_locked_kernel(REPO, lockfile=LOCKFILE)


def experts(hidden_states: torch.Tensor, router_logits: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor):
    """Every token through its two best experts: (T, H), (T, E), (E, 2I, H), (E, H, I) -> (T, H)."""
    weights, index = router_logits.softmax(-1).topk(2)
    return kernel.fused_experts(hidden_states, index, weights, gate_up, down)
