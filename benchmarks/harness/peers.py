"""The implementations under comparison: each is loaded as its own users load it, and takes the same tensors.

A peer that is not installed, cannot run here or gives a wrong result is reported, never fatal.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Callable

import torch
from torch.nn.functional import silu

from .problem import Layer, Shape, Weights

KERNEL = "org/qwen3-moe-fused"
OURS = "qwen3-moe-fused"


@dataclass(frozen=True)
class Peer:
    """An implementation of the layer that holds the weights already."""

    name: str
    layer: Layer
    version: str | None
    always_weight_grads: bool = False  # its backward computes the expert weights' gradients even when frozen
    host_waits: str = ""  # where its host code waits for the GPU, which a CUDA graph cannot hold
    workspace: Callable[[str, int], float] = lambda which, tokens: 0  # bytes, where they decide whether it can run


def load_kernel(path: Path | None) -> ModuleType:
    """The kernel as a user gets it: from the Hub or from where LOCAL_KERNELS says; from a local build with ``path``."""
    from kernels import get_kernel, get_local_kernel

    return get_local_kernel(path) if path else get_kernel(KERNEL, version=1)


def ours(kernel: ModuleType, weights: Weights) -> Peer:
    def layer(hidden_states, top_k_index, top_k_weights):
        return kernel.fused_experts(hidden_states, top_k_index, top_k_weights, *weights)

    return Peer(OURS, layer, None)


def transformers(implementation: str, shape: Shape, weights: Weights) -> Peer:
    """Transformers' own experts module; ``implementation`` is what ``experts_implementation`` takes."""
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.intermediate,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        experts_implementation=implementation,
    )
    with torch.device("meta"):
        experts = Qwen3MoeExperts(config)
    experts.gate_up_proj, experts.down_proj = weights

    def gathered_weights(which: str, tokens: int) -> float:
        copies = 2 if which == "trained" else 1  # its backward makes the gradient of the gathered weights as well
        return copies * tokens * shape.top_k * shape.expert_elements * weights.down_proj.element_size()

    return Peer(
        f"Transformers {implementation}",
        experts,
        installed("transformers"),
        host_waits="it loops over the experts that were hit" if implementation == "eager" else "",
        workspace=gathered_weights if implementation == "batched_mm" else Peer.workspace,
    )


def liger(weights: Weights) -> Peer:
    from liger_kernel.ops import LigerFusedMoEFunction

    def layer(hidden_states, top_k_index, top_k_weights):
        return LigerFusedMoEFunction.apply(hidden_states, *weights, top_k_index.to(torch.int32), top_k_weights)

    return Peer(
        "Liger fused_moe",
        layer,
        installed("liger-kernel"),
        always_weight_grads=True,
        host_waits="it reads the number of tiles back",
    )


def scattermoe(shape: Shape, weights: Weights) -> Peer:
    """Its gated MLP from its public functions: that class puts the gate behind the up projection, we before it."""
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    def layer(hidden_states, top_k_index, top_k_weights):
        routing = flatten_sort_count(top_k_index, num_experts=shape.experts)
        gate_up_proj, down_proj = (weight.permute(0, 2, 1) for weight in weights)
        gate_up = parallel_linear(hidden_states, gate_up_proj, shape.top_k, *routing, grouped_out=True)
        gate, up = gate_up.chunk(2, dim=-1)
        return parallel_linear(silu(gate) * up, down_proj, 1, *routing, gates=top_k_weights, grouped_in=True)

    return Peer(
        "ScatterMoE",
        layer,
        installed("scattermoe"),
        always_weight_grads=True,
        host_waits="it counts rows with bincount",
    )


def loaders(kernel: Callable[[], ModuleType], shape: Shape, weights: Weights) -> dict[str, Callable[[], Peer]]:
    """Every peer by its name on the command line."""
    return {
        "ours": lambda: ours(kernel(), weights),
        "eager": lambda: transformers("eager", shape, weights),
        "batched_mm": lambda: transformers("batched_mm", shape, weights),
        "grouped_mm": lambda: transformers("grouped_mm", shape, weights),
        "liger": lambda: liger(weights),
        "scattermoe": lambda: scattermoe(shape, weights),
    }


PEERS = ("ours", "eager", "batched_mm", "grouped_mm", "liger", "scattermoe")


def installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
