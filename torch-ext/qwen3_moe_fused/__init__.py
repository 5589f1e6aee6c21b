"""Fused Mixture-of-Experts layers for training: grouped GEMMs with gather, SwiGLU and combine inside."""

from . import layers, reference
from .experts import fused_experts
from .four_bit import dequantize, four_bit_weight
from .kept import for_gradients, keeping
from .linear import moe_fused_linear
from .projection import FourBitWeight, Lora
from .routing import Routing, routing
from .weights import ExpertWeights, expert_weights, unsupported_reason

__all__ = [
    "ExpertWeights",
    "FourBitWeight",
    "Lora",
    "Routing",
    "dequantize",
    "expert_weights",
    "for_gradients",
    "four_bit_weight",
    "fused_experts",
    "keeping",
    "layers",
    "moe_fused_linear",
    "reference",
    "routing",
    "unsupported_reason",
]
