"""Stands in for Unsloth, which needs a GPU: what Unsloth 2026.10 makes of a Qwen3-MoE, seen from outside.

- Importing it changes classes. ``Qwen3MoeExperts`` and the block around it have another ``forward``; PEFT's
  ``ParamWrapper`` adapts packed stacks, and hands its factors to the experts instead of adding to weights.
- A model is built of copies of Transformers' classes, of the same names and without Transformers' decorators. The
  projections of its experts are ``Params4bit`` of shape (numel / 2, 1).
- ``get_peft_model`` finds the experts by the names of their projections, makes fp32 factors and turns on reentrant
  gradient checkpointing.

Importing and loading change classes for good, so whoever uses it should do so in a process of its own.
"""

import inspect
import math
import sys
from copy import copy
from pathlib import Path
from types import ModuleType
from typing import Any, Optional

import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Params4bit
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import layer as peft_layer
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.qwen3_moe import modeling_qwen3_moe as modeling

COPIED = ("Qwen3MoeExperts", "Qwen3MoeTopKRouter", "Qwen3MoeSparseMoeBlock")
PROJECTIONS = ("gate_up_proj", "down_proj")


def _experts_forward(self, hidden_states, top_k_index, top_k_weights):
    out = torch.zeros_like(hidden_states)
    gate_up_proj, down_proj = (_weight(self, name, hidden_states.dtype) for name in PROJECTIONS)
    for expert in range(len(down_proj)):
        token, slot = torch.where(top_k_index == expert)
        gate, up = F.linear(hidden_states[token], gate_up_proj[expert]).chunk(2, dim=-1)
        down = F.linear(F.silu(gate) * up, down_proj[expert])
        out = out.index_add(0, token, (down * top_k_weights[token, slot, None]).to(out.dtype))
    return out


def _weight(experts: nn.Module, name: str, dtype: torch.dtype) -> torch.Tensor:
    """A stack decoded, as one row: on CPUs with AVX-512 bitsandbytes is right for whole rows of blocks only."""
    packed = getattr(experts, name)
    row = copy(packed.quant_state)
    shape, row.shape = row.shape, torch.Size((math.prod(row.shape),))
    weight = dequantize_4bit(packed.data, row).view(shape).to(dtype)
    if name in vars(experts).get("unsloth_factors", {}):
        A, B, scaling = experts.unsloth_factors[name]
        A, B = A.view(len(weight), -1, A.shape[1]), B.view(len(B), -1, len(weight)).permute(2, 0, 1)
        weight = weight + scaling * (B @ A).to(dtype)
    return weight


@torch.compiler.disable
def _block_forward(self, hidden_states):
    tokens = hidden_states.view(-1, hidden_states.shape[-1])
    _, top_k_weights, top_k_index = self.gate(tokens)
    return self.experts(tokens, top_k_index, top_k_weights).reshape(hidden_states.shape)


def _wrapper_sizes(self, module: nn.Module) -> tuple[int, int]:
    self.num_experts, rows, columns = getattr(self.get_base_layer(), self.parameter_name).quant_state.shape
    self._param_ndim = 3
    return rows, columns


def _wrapper_forward(self, x, *args):
    experts, module, factors = self.get_base_layer(), self, {}
    while module is not experts:
        name = module.active_adapters[0]
        factors[module.parameter_name] = (
            module.lora_A[name].weight,
            module.lora_B[name].weight,
            module.scaling[name],
        )
        module = module.base_layer
    experts.unsloth_factors = factors
    return experts(x, *args)


def _copies() -> ModuleType:
    """The classes again, from their source: ``super()`` in a class knows the class it was written in."""
    module = ModuleType("unsloth_compiled_module_qwen3_moe")
    vars(module).update({name: value for name, value in vars(modeling).items() if not name.startswith("__")})
    sys.modules[module.__name__] = module
    for name in COPIED:
        original = getattr(modeling, name)
        source = inspect.getsource(original)
        exec(source[source.index(f"class {name}") :], vars(module))
        getattr(module, name).forward = original.forward
    return module


class FastModel:
    @staticmethod
    def from_pretrained(
        model_name: str,
        max_seq_length: int = 2048,
        dtype: Optional[torch.dtype] = None,
        load_in_4bit: bool = True,
        **settings: Any,
    ) -> tuple[nn.Module, Any]:
        assert load_in_4bit
        for name in COPIED:
            setattr(modeling, name, getattr(_compiled, name))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(model_name, dtype=dtype or torch.bfloat16)
        for module in model.modules():
            if type(module).__name__ == "Qwen3MoeExperts":
                for name in PROJECTIONS:
                    packed = Params4bit(getattr(module, name).data, False, quant_type="nf4", compress_statistics=True)
                    setattr(module, name, packed.to(device))
        has_tokenizer = (Path(model_name) / "tokenizer_config.json").exists()
        return model.to(device), AutoTokenizer.from_pretrained(model_name) if has_tokenizer else None

    @staticmethod
    def get_peft_model(
        model: nn.Module,
        r: int = 16,
        target_modules: tuple[str, ...] = (),
        lora_alpha: float = 16,
        use_gradient_checkpointing: Any = "unsloth",
        random_state: int = 3407,
        **settings: Any,
    ) -> nn.Module:
        torch.manual_seed(random_state)
        asked = {"gate_up_proj" if name in ("gate_proj", "up_proj") else name for name in target_modules}
        config = LoraConfig(
            r=r,
            lora_alpha=lora_alpha,
            target_modules=[name for name in asked if name not in PROJECTIONS],
            target_parameters=[f"mlp.experts.{name}" for name in PROJECTIONS if name in asked],
            task_type="CAUSAL_LM",
        )
        if use_gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
            model.enable_input_require_grads()
        model = get_peft_model(model, config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        return model


modeling.Qwen3MoeExperts.forward = _experts_forward
modeling.Qwen3MoeSparseMoeBlock.forward = _block_forward
peft_layer.ParamWrapper._get_in_out_features = _wrapper_sizes
peft_layer.ParamWrapper.forward = _wrapper_forward
if "__torch_function__" in vars(Params4bit):
    del Params4bit.__torch_function__
_compiled = _copies()
