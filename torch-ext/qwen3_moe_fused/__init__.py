"""Fused Mixture-of-Experts layers for training: grouped GEMMs with gather, SwiGLU and combine inside."""

from . import layers, reference
from .experts import fused_experts
from .linear import moe_fused_linear
from .routing import Routing, routing
from .weights import ExpertWeights, expert_weights, unsupported_reason

__all__ = [
    "ExpertWeights",
    "Routing",
    "expert_weights",
    "fused_experts",
    "layers",
    "moe_fused_linear",
    "reference",
    "routing",
    "unsupported_reason",
]
