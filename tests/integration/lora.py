"""Adapters of experts, on the kernel and as PEFT runs them, and what is built on the way."""

import copy
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qwen3_moe_integration import kernelize_model
from tests.integration.models import QWEN3, Tiny, stock_twin

Tensor = torch.Tensor

PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def config(**changes: Any) -> LoraConfig:
    """Of attention and of all experts; random factors, so that the adapters change the result."""
    settings = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "target_parameters": PARAMETERS,
        "init_lora_weights": False,
    }
    return LoraConfig(**settings | changes)


def pair(
    source: Any, *configs: LoraConfig, kernelized: str = "after", tiny: Tiny = QWEN3, device: str = "cpu"
) -> tuple[PeftModel, ...]:
    """A model on the kernel and one on stock experts, with the same weights and adapters "first", "second"."""
    model = tiny.build().to(device)
    stock = stock_twin(model)
    if kernelized == "before":
        kernelize_model(model, kernel=source)
    model, stock = with_adapters(model, *configs), with_adapters(stock, *configs)
    if kernelized == "after":
        kernelize_model(model, kernel=source)
    stock.load_state_dict(model.state_dict())
    return model.train(), stock.train()


def with_adapters(model: nn.Module, *configs: LoraConfig) -> PeftModel:
    """The first is active and trained."""
    model = get_peft_model(model, copy.deepcopy(configs[0]), adapter_name="first")
    for each in configs[1:]:
        model.add_adapter("second", copy.deepcopy(each))
    return model


class StackSized(TorchDispatchMode):
    """Counts the tensors made that are as large as a stack of experts, while it is entered."""

    def __init__(self, model: nn.Module):
        super().__init__()
        stacks = [p for name, p in model.named_parameters() if name.endswith(("gate_up_proj", "down_proj"))]
        self.size = min(getattr(getattr(p, "quant_state", p), "shape", p.shape).numel() for p in stacks)
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor) and x.numel() >= self.size:
                self.made += x.untyped_storage().data_ptr() not in self.weights
        return out
