"""What makes a model ready to train as a user would: Liger's parts, checkpointing, LoRA."""

from __future__ import annotations

import importlib.util

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

LORA = {
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}
LOSS_CHUNK = 16
"""Liger's chunk_mem_const, an argument of the model's forward. By itself Liger takes 64 tokens of 4096 at a time here
and reads lm_head anew for each such chunk; chunks 16 times as large are as fast as one product."""


def liger_runs(device: str) -> bool:
    """Whether Liger's kernels are installed and ``device`` can run them."""
    return device == "cuda" and importlib.util.find_spec("liger_kernel") is not None


def apply_liger(model: nn.Module) -> None:
    """Norms, rotary embedding and loss of a Qwen3-MoE; the experts are left alone."""
    from liger_kernel.transformers import apply_liger_kernel_to_qwen3_moe

    apply_liger_kernel_to_qwen3_moe(model=model, swiglu=False)


def checkpointed(model: nn.Module) -> nn.Module:
    """In training mode, with its layers computed again in backward."""
    model.config.use_cache = False
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def add_lora(model: nn.Module, rank: int) -> PeftModel:
    """Adapters of attention and of all experts, in the dtype of its products, scaled by 1."""
    model.enable_input_require_grads()
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, **LORA), autocast_adapter_dtype=False)
