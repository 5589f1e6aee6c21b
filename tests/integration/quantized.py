"""What the tests of 4-bit loading share: checkpoints, settings, and comparisons bit for bit."""

import json
import math
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any, Optional

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from qwen3_moe_integration import MoeBitsAndBytesConfig
from tests.integration.models import QWEN3, Tiny

Tensor = torch.Tensor

NESTED = MoeBitsAndBytesConfig()
PLAIN_FP4 = MoeBitsAndBytesConfig(
    bnb_4bit_quant_type="fp4",
    bnb_4bit_use_double_quant=False,
    bnb_4bit_quant_storage=torch.bfloat16,
    bnb_4bit_compute_dtype=torch.float16,
    experts_blocksize=256,
)
SIZES = {"hidden_size": 64, "moe_intermediate_size": 64, "head_dim": 16}
"""Every row is whole blocks of 64 weights, as in real models."""


def checkpoint(folder: Path, tiny: Tiny = QWEN3, **changes: Any) -> nn.Module:
    """Saves a model in bf16, as one downloads it: per-expert weights in several shards. Returns it."""
    model = tiny.build(**changes).bfloat16()
    model.save_pretrained(folder, max_shard_size="60KB")
    assert len([*folder.glob("*.safetensors")]) > 1
    return model


def load(folder: Path, config: Any = None, **kwargs: Any) -> nn.Module:
    """A checkpoint in full precision with ``config``, or one in 4 bit."""
    settings = {} if config is None else {"quantization_config": config, "dtype": torch.bfloat16}
    return AutoModelForCausalLM.from_pretrained(folder, **settings | kwargs)


def experts_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The stacks of experts, by their full names."""
    return {
        name: x for name, x in model.named_parameters() if name.endswith(("experts.gate_up_proj", "experts.down_proj"))
    }


def decoded(packed: Tensor, state: Optional[QuantState] = None) -> Tensor:
    """By bitsandbytes, which on CPUs with AVX-512 is right for whole rows of blocks only: as one row."""
    state = copy(state or packed.quant_state)
    shape, state.shape = state.shape, torch.Size((math.prod(state.shape),))
    return dequantize_4bit(packed.data, state).view(shape)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Also where the bits, taken for a float, are no number."""
    same_kind = a.dtype == b.dtype and a.shape == b.shape
    return same_kind and torch.equal(*(x.contiguous().flatten().view(torch.uint8) for x in (a, b)))


def assert_same_model(a: nn.Module, b: nn.Module) -> None:
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    assert [key for key in a if not same_bits(a[key], b[key])] == []


def tensor_names(folder: Path) -> set[str]:
    """Of all tensors in a checkpoint's files."""
    return {name for file in folder.glob("*.safetensors") for name in load_file(file)}


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Rewrites a checkpoint as one file, with its tensors changed in place."""
    files = sorted(folder.glob("*.safetensors"))
    with safe_open(files[0], "pt") as file:
        metadata = file.metadata()
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    for file in folder.glob("model*"):
        file.unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata)


def edit_config(folder: Path, **quantization: Any) -> None:
    """Changes entries of the quantization config in config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.setdefault("quantization_config", {}).update(quantization)
    path.write_text(json.dumps(config))
