"""What an experts module holds, read in one place.

A module qualifies when it has ``gate_up_proj`` and ``down_proj`` as plain 3-D tensors, no biases and an activation
the kernels know. Whatever wraps such a module (PEFT, a sharding hook) keeps the right to see the call first.
"""

from typing import NamedTuple, Optional

import torch
from torch import nn

_ACTIVATIONS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELU": "gelu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
}


class ExpertWeights(NamedTuple):
    """gate_up_proj (E, 2I, H), down_proj (E, H, I) and the activation's name, in the order ``fused_experts`` takes."""

    gate_up_proj: torch.Tensor
    down_proj: torch.Tensor
    activation: str


def activation_name(act_fn) -> Optional[str]:
    """The kernels' name for an activation module or function; None if they do not know it."""
    if isinstance(act_fn, nn.GELU) and act_fn.approximate == "tanh":
        return "gelu_tanh"
    return _ACTIVATIONS.get(type(act_fn).__name__)


def unsupported_reason(experts: nn.Module) -> Optional[str]:
    """Why ``fused_experts`` cannot stand in for this experts module's own forward; None if it can."""
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(experts, name, None)
        if not isinstance(weight, torch.Tensor) or weight.dim() != 3:
            return f"it has no 3-D tensor {name}"
    if getattr(experts, "has_bias", False):
        return "its projections have biases"
    if not getattr(experts, "has_gate", True):
        return "it has no gate"
    if not getattr(experts, "is_concatenated", True):
        return "its gate and up rows are interleaved"
    if getattr(experts, "has_post_expert_norm", False):
        return "it normalises after each expert"
    if activation_name(getattr(experts, "act_fn", None)) is None:
        return f"its activation is {type(getattr(experts, 'act_fn', None)).__name__}"
    return None


def expert_weights(experts: nn.Module) -> ExpertWeights:
    """The weights of an experts module; transposed storage (E, H, 2I) becomes a view, not a copy.

    Raises:
        ValueError: the module is not one that ``fused_experts`` can compute; see :func:`unsupported_reason`.
    """
    reason = unsupported_reason(experts)
    if reason is not None:
        raise ValueError(f"experts: {type(experts).__name__} cannot run as fused_experts: {reason}")
    gate_up_proj, down_proj = experts.gate_up_proj, experts.down_proj
    if getattr(experts, "is_transposed", False):
        gate_up_proj, down_proj = gate_up_proj.transpose(1, 2), down_proj.transpose(1, 2)
    return ExpertWeights(gate_up_proj, down_proj, activation_name(experts.act_fn))


def is_wrapped(experts: nn.Module) -> bool:
    """Whether something stands between a caller and the weights: a PEFT layer, or hooks that must fire."""
    return (
        not isinstance(getattr(experts, "gate_up_proj", None), torch.Tensor)
        or hasattr(experts, "base_layer")
        or bool(experts._forward_pre_hooks)
        or bool(experts._forward_hooks)
    )
