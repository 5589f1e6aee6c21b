"""The engines that spread training over GPUs, each around a model with random weights.

alone    no engine: every rank trains by itself
ddp      LoRA over 4 bit, the whole model on every rank
fsdp2    the same, every decoder layer sharded over the ranks
experts  the same, every layer's experts and their adapters shared out over the ranks, the rest as in ddp
whole    all weights in bf16, sharded by FSDP2
ep       all weights in bf16: experts stay with the rank that has them and tokens travel, the rest is sharded

The first four, as a user would train them, have Liger's norms, rotary embedding and loss where it runs.
"""

from __future__ import annotations

import shutil
import tempfile

import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.distributed import DistributedConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer

from qwen3_moe_integration import (
    KernelSource,
    enable_fused_linear_lora,
    enable_graphed_checkpointing,
    kernelize_model,
    register,
    share_out_experts,
)

from .model import random_4_bit_model
from .training import LOSS_CHUNK, add_lora, apply_liger, checkpointed, liger_runs

LORA_ENGINES = ("alone", "ddp", "fsdp2", "experts")
ENGINES = (*LORA_ENGINES, "whole", "ep")


def loss_options(engine: str, device: torch.device) -> dict:
    """What the forward of an engine's model takes beside tokens."""
    return {"chunk_mem_const": LOSS_CHUNK} if engine in LORA_ENGINES and liger_runs(device.type) else {}


def build(
    engine: str, sizes: Qwen3MoeConfig, rank: int, kernel: KernelSource, device: torch.device, graphs: bool
) -> nn.Module:
    """The model, wrapped and ready to train.

    Args:
        engine: one of ENGINES.
        sizes: of the model.
        rank: of the LoRA on attention and all experts, where there is one.
        kernel: where the kernel comes from.
        device: this process's.
        graphs: whether the layers of LoRA engines are checkpointed by CUDA graphs; what FSDP2 shards cannot be.
    """
    torch.manual_seed(0)
    if engine == "ep":
        return checkpointed(_expert_parallel(sizes, kernel, device))
    if engine == "whole":
        with device:
            model = Qwen3MoeForCausalLM._from_config(sizes, dtype=torch.bfloat16)
        model = kernelize_model(checkpointed(model), kernel=kernel)
    else:
        model = random_4_bit_model(sizes, device.type, storage=torch.bfloat16)
        if liger_runs(device.type):
            apply_liger(model)
        model = enable_fused_linear_lora(add_lora(kernelize_model(checkpointed(model), kernel=kernel), rank))
        if graphs:
            enable_graphed_checkpointing(model)
    if engine == "experts":
        share_out_experts(model)
    if engine in ("ddp", "experts"):
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    if engine in ("fsdp2", "whole"):
        for layer in [module for module in model.modules() if isinstance(module, Qwen3MoeDecoderLayer)]:
            fully_shard(layer)
        fully_shard(model)
    return model


def _expert_parallel(sizes: Qwen3MoeConfig, kernel: KernelSource, device: torch.device) -> nn.Module:
    """Transformers shares experts out while it loads, so there has to be a checkpoint; the first rank writes it."""
    register(kernel)
    folder = [tempfile.mkdtemp()] if distributed.get_rank() == 0 else [None]
    distributed.broadcast_object_list(folder)
    if distributed.get_rank() == 0:
        with device:
            model = Qwen3MoeForCausalLM._from_config(sizes, dtype=torch.bfloat16)
        model.save_pretrained(folder[0])
        del model
    distributed.barrier()
    ranks = distributed.get_world_size()
    model = AutoModelForCausalLM.from_pretrained(
        folder[0],
        dtype=torch.bfloat16,
        experts_implementation="qwen3_moe_fused",
        distributed_config=DistributedConfig(fsdp_size=ranks, ep_size=ranks),
    )
    distributed.barrier()
    if distributed.get_rank() == 0:
        shutil.rmtree(folder[0])
    return model
