"""The kernel as an experts implementation of Transformers, for every model whose experts follow that interface.

Transformers calls the function in place of an experts module's ``forward``. Experts that the kernel cannot compute
run as they would without it, and one warning says why.
"""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Optional

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate
from transformers.utils import logging

EXPERTS_IMPLEMENTATION = "qwen3_moe_fused"
STOCK_IMPLEMENTATION = "grouped_mm"  # what Transformers takes when it is asked for none

logger = logging.get_logger(__name__)


def experts_function(kernel: ModuleType) -> Callable:
    """The function to register: ``function(experts, hidden_states, top_k_index, top_k_weights) -> (T, H)``.

    Its attribute ``unsupported_reason`` says why an experts module cannot run on the kernel; None if it can.
    ``kernel`` is the kernel's module.
    """
    layer, stock = kernel.layers.Qwen3MoeExperts, ALL_EXPERTS_FUNCTIONS[STOCK_IMPLEMENTATION]

    def unsupported_reason(experts: nn.Module, call_gathers: bool = False) -> Optional[str]:
        return _gate_reason(experts) or kernel.unsupported_reason(experts, call_gathers)

    def qwen3_moe_fused(
        experts: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        reason = unsupported_reason(experts)
        if reason is None:
            return layer.forward(experts, hidden_states, top_k_index, top_k_weights)
        if hasattr(getattr(experts, "gate_up_proj", None), "quant_state") or getattr(experts, "quant_states", None):
            raise ValueError(f"{type(experts).__name__} is in 4 bit, so it can run on the kernel alone: {reason}")
        _warn_once(
            f"{type(experts).__name__} runs on Transformers' {STOCK_IMPLEMENTATION} instead of "
            f"{EXPERTS_IMPLEMENTATION}: {reason}"
        )
        return stock(experts, hidden_states, top_k_index, top_k_weights)

    qwen3_moe_fused.unsupported_reason = unsupported_reason
    qwen3_moe_fused.kernel = kernel
    return qwen3_moe_fused


def takes_adapters(experts: nn.Module) -> bool:
    """Whether a call of this experts module runs a kernel, which then adds the adapters in ``experts.lora``."""
    return hasattr(kernel_of(experts), "Lora")


def kernel_of(experts: nn.Module) -> Optional[ModuleType]:
    """The kernel that a call of this experts module runs; if it runs none, some other module or None."""
    forward = getattr(experts, "_old_forward", experts.forward)  # Accelerate's hooks stand in front of it
    try:  # its globals, for until PyTorch 2.12 torch.compile could not tell a function's __module__
        kernel = sys.modules.get(forward.__func__.__globals__["__package__"])
    except AttributeError:  # no method, so none of a kernel's
        kernel = None
    function = ALL_EXPERTS_FUNCTIONS.get(EXPERTS_IMPLEMENTATION)
    chosen = getattr(getattr(experts, "config", None), "_experts_implementation", None) == EXPERTS_IMPLEMENTATION
    if not hasattr(kernel, "fused_experts") and chosen:
        reason = function.unsupported_reason(experts, call_gathers=isinstance(experts, FSDPModule))
        kernel = function.kernel if reason is None else kernel
    return kernel


def kernel_in(model: nn.Module) -> Optional[ModuleType]:
    """The kernel that experts of this model run on; None if none do."""
    experts = (module for module in model.modules() if hasattr(type(module), "_apply_gate"))
    return next((kernel for kernel in map(kernel_of, experts) if hasattr(kernel, "fused_experts")), None)


def _gate_reason(experts: nn.Module) -> Optional[str]:
    """The one thing that only Transformers can tell: whether gate and up are joined as usual, ``act(gate) * up``."""
    if type(experts)._apply_gate is not _default_apply_gate:
        return "it joins its gate and up projections in a way of its own"
    return None


@torch.compiler.assume_constant_result
def _warn_once(line: str) -> None:
    """Under ``torch.compile`` this is called while the model is traced; to trace a logger would break the graph."""
    logger.warning_once(line)
