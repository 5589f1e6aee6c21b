"""What an experts module holds, read in one place.

A module qualifies when it has ``gate_up_proj`` and ``down_proj`` as plain 3-D tensors or as 4-bit stacks of
bitsandbytes, no biases and an activation the kernels know. Whatever wraps such a module (PEFT, a sharding hook) keeps
the right to see the call first, and may leave adapters on the module for the time of the call: ``experts.lora``, a
dict that has the fields of a ``Lora`` for ``"gate_up_proj"``, ``"down_proj"`` or both.

A sharding engine that gathers parameters hands over plain tensors, which have lost bitsandbytes' ``quant_state``. So
whoever quantizes leaves it on the module too: ``experts.quant_states``, a dict by projection.
"""

from types import MethodType
from typing import Any, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import nn

from .four_bit import four_bit_weight
from .projection import FourBitWeight, Lora, Weight

_ACTIVATIONS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELU": "gelu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
}


class ExpertWeights(NamedTuple):
    """gate_up_proj (E, 2I, H), down_proj (E, H, I), each a tensor or a ``FourBitWeight``, the activation's name and the
    adapters of both, in the order ``fused_experts`` takes."""

    gate_up_proj: Weight
    down_proj: Weight
    activation: str
    gate_up_lora: Optional[Lora] = None
    down_lora: Optional[Lora] = None

    @property
    def dtype(self) -> torch.dtype:
        """That of products: of a dense projection, if there is one, or else the one that 4-bit stacks name."""
        first_if_dense = self.down_proj if isinstance(self.gate_up_proj, FourBitWeight) else self.gate_up_proj
        return first_if_dense.dtype


def activation_name(act_fn) -> Optional[str]:
    """The kernels' name for an activation module or function; None if they do not know it."""
    if isinstance(act_fn, nn.GELU) and act_fn.approximate == "tanh":
        return "gelu_tanh"
    if act_fn is F.silu:
        return "silu"
    return _ACTIVATIONS.get(type(act_fn).__name__)


def unsupported_reason(experts: nn.Module, call_gathers: bool = False) -> Optional[str]:
    """Why ``fused_experts`` cannot stand in for this experts module's own forward; None if it can.

    With ``call_gathers`` the weights may be sharded now, because a hook gathers them when the module is called.

    Raises:
        TypeError: ``experts`` is no module.
    """
    return _unsupported_reason(experts, *_projections(experts), call_gathers)


def expert_weights(experts: nn.Module) -> ExpertWeights:
    """The weights and adapters of an experts module; transposed storage (E, H, 2I) becomes a view, not a copy.

    Raises:
        ValueError: the module is not one that ``fused_experts`` can compute; see :func:`unsupported_reason`.
        TypeError: ``experts`` is no module.
    """
    gate_up_proj, down_proj = _projections(experts)
    reason = _unsupported_reason(experts, gate_up_proj, down_proj)
    if reason is not None:
        raise ValueError(f"experts: {type(experts).__name__} cannot run as fused_experts: {reason}")
    weights = (_weight(experts, "gate_up_proj", gate_up_proj), _weight(experts, "down_proj", down_proj))
    lora = _plain(experts, "lora", {})
    adapters = (Lora(*lora[name]) if name in lora else None for name in ("gate_up_proj", "down_proj"))
    return ExpertWeights(*weights, activation_name(experts.act_fn), *adapters)


def _weight(experts: nn.Module, name: str, parameter: torch.Tensor) -> Weight:
    state = _quant_state(experts, name, parameter)
    if state is not None:
        return four_bit_weight(parameter, state)
    return parameter.transpose(1, 2) if _plain(experts, "is_transposed", False) else parameter


def is_wrapped(experts: nn.Module) -> bool:
    """Whether something may stand between a caller and the weights.

    That is a PEFT layer or a parametrization, which holds the weights itself; hooks, which must fire; or a function
    put in the place of ``forward``, as offloading and tensor parallelism do.
    """
    return (
        "gate_up_proj" not in experts._parameters
        or not isinstance(experts.forward, MethodType)
        or bool(experts._forward_pre_hooks or experts._forward_hooks)
        or bool(experts._backward_pre_hooks or experts._backward_hooks)
    )


def _projections(experts: nn.Module) -> Tuple[Optional[torch.Tensor], Optional[torch.Tensor]]:
    """Read once a call: under a parametrization, reading computes the tensor."""
    if not isinstance(experts, nn.Module):
        raise TypeError(f"experts must be a module, got {type(experts).__name__}")
    return getattr(experts, "gate_up_proj", None), getattr(experts, "down_proj", None)


def _plain(experts: nn.Module, name: str, default: Any) -> Any:
    """An attribute that is no tensor or module. ``nn.Module`` would look among those too, and takes 1 us, five times in
    each call, to say that there is none."""
    return experts.__dict__[name] if name in experts.__dict__ else getattr(type(experts), name, default)


def _quant_state(experts: nn.Module, name: str, parameter: Optional[torch.Tensor]) -> Any:
    """None for a dense projection."""
    state = getattr(parameter, "quant_state", None)
    return _plain(experts, "quant_states", {}).get(name) if state is None else state


def _unsupported_reason(experts: nn.Module, gate_up_proj, down_proj, call_gathers: bool = False) -> Optional[str]:
    if not _plain(experts, "has_gate", True):
        return "it has no gate"
    if _plain(experts, "has_bias", False):
        return "its projections have biases"
    if not _plain(experts, "is_concatenated", True):
        return "its gate and up rows are interleaved"
    if _plain(experts, "has_post_expert_norm", False):
        return "it normalises after each expert"
    for name, weight in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj)):
        if hasattr(weight, "ds_id") and not weight.numel():
            return f"its {name} is partitioned by DeepSpeed and not gathered"
        state = _quant_state(experts, name, weight)
        if state is not None:
            if len(state.shape) != 3:
                return f"its {name} is in 4 bit, but no 3-D stack: {tuple(state.shape)}"
            if _plain(experts, "is_transposed", False):
                return f"its {name} is in 4 bit and stored transposed"
        elif not isinstance(weight, torch.Tensor) or weight.dim() != 3:
            return f"it has no 3-D tensor {name}"
        if hasattr(weight, "device_mesh") and not call_gathers:
            return f"its {name} is sharded (a {type(weight).__name__})"
    act_fn = getattr(experts, "act_fn", None)
    if activation_name(act_fn) is None:
        return f"its activation is {getattr(act_fn, '__name__', type(act_fn).__name__)}"
    return None
