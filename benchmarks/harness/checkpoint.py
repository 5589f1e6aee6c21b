"""A checkpoint as the Hub has them, with random weights: every expert's matrices on their own, bf16, in shards.

Shards are made and written one by one, so it takes no more memory than one of them, however large the model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from .config import DEVIATION

SHARD_BYTES = 4 * 10**9
"""What a shard of Qwen/Qwen3-30B-A3B takes."""
ELEMENT_BYTES = 2


def write_checkpoint(
    folder: Path, sizes: Qwen3MoeConfig, device: str, shard_bytes: int = SHARD_BYTES, seed: int = 0
) -> None:
    """Writes the model to ``folder``, which appears only when it is complete; ``device`` draws the weights."""
    beside = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    shards = _allot(sizes, shard_bytes)
    generator = torch.Generator(device).manual_seed(seed)
    weight_map, total = {}, 0
    for number, shapes in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: _drawn(shape, generator).cpu() for name, shape in shapes.items()}
        save_file(tensors, beside / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += ELEMENT_BYTES * sum(tensor.numel() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (beside / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    sizes.architectures, sizes.dtype = ["Qwen3MoeForCausalLM"], torch.bfloat16
    sizes.save_pretrained(beside)
    beside.rename(folder)
    if device == "cuda":
        torch.cuda.empty_cache()


def shard_sizes(folder: Path) -> list[int]:
    """Bytes of each file of weights."""
    return [file.stat().st_size for file in sorted(folder.glob("*.safetensors"))]


def _allot(sizes: Qwen3MoeConfig, shard_bytes: int) -> list[dict[str, tuple[int, ...]]]:
    """Names and shapes of the tensors of each shard, as many as fit."""
    shards, room = [], 0
    for name, shape in _tensors(sizes):
        size = ELEMENT_BYTES * torch.Size(shape).numel()
        if not shards or size > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = shape
        room -= size
    return shards


def _tensors(sizes: Qwen3MoeConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes in the order of the model, its stacks of experts taken apart."""
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(sizes)
    for name, parameter in model.named_parameters():
        if parameter.dim() != 3:
            yield name, tuple(parameter.shape)
            continue
        experts, rows, columns = parameter.shape
        prefix, _, stack = name.rpartition(".")
        projections = ("gate_proj", "up_proj") if stack == "gate_up_proj" else ("down_proj",)
        for expert in range(experts):
            for projection in projections:
                yield f"{prefix}.{expert}.{projection}.weight", (rows // len(projections), columns)


def _drawn(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    drawn = torch.empty(shape, dtype=torch.bfloat16, device=generator.device)
    return drawn.normal_(0, DEVIATION, generator=generator)
