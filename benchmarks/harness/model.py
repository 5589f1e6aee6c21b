"""Qwen3-30B-A3B with any number of layers and random weights, in 4 bit, without ever being anything else.

Weights are drawn on the device and quantized matrix by matrix, so the largest thing that exists in full precision is
one matrix: all 48 layers can be built on the card that they are to train on.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations import replace_with_bnb_linear

from qwen3_moe_integration.quantize import MoeBitsAndBytesConfig
from qwen3_moe_integration.quantize.stacks import place_stack, quantize_stack

from .config import DEVIATION


def random_4_bit_model(
    sizes: Qwen3MoeConfig,
    device: str,
    seed: int = 0,
    storage: torch.dtype = torch.uint8,
    experts_in_4_bit: bool = True,
) -> Qwen3MoeForCausalLM:
    """The model, NF4 with double quantization in attention and experts, bf16 elsewhere.

    ``storage`` is the dtype that packed weights are kept as; FSDP wants a float. Transformers' own 4 bit leaves the
    experts in bf16, as this does without ``experts_in_4_bit``.
    """
    torch.manual_seed(seed)
    settings = MoeBitsAndBytesConfig(bnb_4bit_quant_storage=storage)
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM._from_config(sizes, dtype=torch.bfloat16)
    skipped = ["lm_head", *(name for name, _ in model.named_modules() if name.endswith("mlp.gate"))]
    replace_with_bnb_linear(model, skipped, settings)
    for name, parameter in list(model.named_parameters()):
        module_name, _, last = name.rpartition(".")
        module = model.get_submodule(module_name)
        if parameter.dim() == 3 and experts_in_4_bit:
            experts = (_normal(parameter.shape[1:], device) for _ in range(parameter.shape[0]))
            place_stack(module, last, quantize_stack(name, experts, parameter.shape, settings))
        elif hasattr(module, "quant_state"):
            full = type(parameter)(
                _normal(parameter.shape, device),
                requires_grad=False,
                quant_type="nf4",
                compress_statistics=True,
                quant_storage=storage,
            )
            module.weight = full.to(device)
            module.quant_state = module.weight.quant_state
        else:
            drawn = torch.ones(parameter.shape, dtype=torch.bfloat16, device=device)
            drawn = drawn if parameter.dim() == 1 else _normal(parameter.shape, device)
            setattr(module, last, nn.Parameter(drawn, requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(sizes).to(device)
    model.is_loaded_in_4bit = model.is_quantized = True
    model.config.use_cache = False
    return model


def _normal(shape: tuple[int, ...], device: str) -> torch.Tensor:
    return torch.randn(tuple(shape), dtype=torch.bfloat16, device=device) * DEVIATION
