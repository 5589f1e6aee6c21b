"""Tiny models with random weights, and what the tests ask of them: results, gradients, calls of the kernel."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from tests.kernel.oracle import assert_close

Tensor = torch.Tensor

VOCABULARY = 64
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,  # large enough for the experts to matter in the logits
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,  # generate() runs to its full length
}
RATIO = 1e-5
GPU_RATIO = 5e-5
"""How far a kernelized model may be from stock in fp32, as a ratio of norms; and on a GPU, where both sum otherwise."""


@dataclass(frozen=True)
class Tiny:
    """A model type with the sizes that it calls by other names; ``moe_layers`` of its layers have experts."""

    model_type: str
    sizes: dict[str, Any] = field(default_factory=dict)
    moe_layers: int = 2

    def __repr__(self) -> str:
        return self.model_type

    def build(self, **changes: Any) -> nn.Module:
        config = AutoConfig.for_model(self.model_type, **{**SIZES, **self.sizes, **changes})
        return AutoModelForCausalLM.from_config(config)


QWEN3 = Tiny("qwen3_moe")


def stock_twin(model: nn.Module, implementation: str = "eager") -> nn.Module:
    """A copy with the same weights, whose experts run on Transformers' own ``implementation``."""
    twin = copy.deepcopy(model)
    twin.set_experts_implementation(implementation)
    return twin


def tokens(batch: int = 2, length: int = 13, device: str = "cpu") -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), device=device)


def random_routing(rows: int, experts: int = 8, k: int = 2) -> tuple[Tensor, Tensor]:
    """(top_k_index, top_k_weights) as a router gives them: k different experts per row."""
    weights, index = torch.rand(rows, experts).softmax(-1).topk(k)
    return index, weights


def assert_same_training(
    model: nn.Module, stock: nn.Module, call: Optional[Callable] = None, length: int = 13, ratio: float = RATIO
) -> None:
    """Logits, loss and the gradient of every trained parameter are the same; ``call`` runs ``model`` another way."""
    input_ids = tokens(length=length, device=str(next(stock.parameters()).device))
    want, got = (
        _training_step(*each, input_ids) for each in ((stock, stock), (model, model if call is None else call))
    )
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert_close(name, tensor, got[name], ratio)


def _training_step(model: nn.Module, call: Callable, input_ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    out = call(input_ids=input_ids, labels=input_ids, use_cache=False)
    out.loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    results = {"logits": out.logits, "loss": out.loss, **grads}
    return {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in results.items()}


def generated(model: nn.Module, length: int = 12) -> Tensor:
    prompt = torch.arange(2, 14, device=model.device).reshape(2, 6)
    return model.eval().generate(prompt, do_sample=False, min_new_tokens=length, max_new_tokens=length)


class ExpertsCalls(TorchDispatchMode):
    """Counts the calls of the kernel's experts op, of whatever build, while it is entered."""

    forward, backward = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        self.forward += name.startswith("_qwen3_moe_fused") and name.endswith(".fused_experts.default")
        self.backward += name.startswith("_qwen3_moe_fused") and name.endswith(".fused_experts_backward.default")
        return func(*args, **(kwargs or {}))
