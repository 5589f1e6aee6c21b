"""Puts the qwen3-moe-fused kernel into Transformers models; knows Transformers, PEFT, bitsandbytes and ``kernels``, and
of Triton no more than the optimizer's kernel does."""

from . import peft_hooks
from .adapter_loading import load_adapters_in_place
from .clipping import clip_grad_norm_
from .expert_parallel import share_out_experts, whole_adapters
from .graphed import enable_graphed_checkpointing
from .kernelize import kernelize_model
from .lora import expert_lora_config
from .lora_linear import enable_fused_linear_lora
from .quantize import MoeBitsAndBytesConfig, legacy_config
from .registry import register
from .source import KernelSource

__all__ = [
    "KernelSource",
    "MoeBitsAndBytesConfig",
    "clip_grad_norm_",
    "enable_fused_linear_lora",
    "enable_graphed_checkpointing",
    "expert_lora_config",
    "kernelize_model",
    "legacy_config",
    "load_adapters_in_place",
    "register",
    "share_out_experts",
    "whole_adapters",
]

peft_hooks.install()
