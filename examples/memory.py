"""Whether a run fits into the GPU, said before it starts, and what keeps a large model's step small."""

import argparse
import importlib.util
import os
from dataclasses import replace
from functools import cache

import torch
from host_memory import pinnable
from kernelized import DEVICE
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, default_data_collator

from qwen3_moe_integration.plan import Plan, Step, make_plan
from qwen3_moe_integration.plan.memory import CONTEXT

GIB = 2**30
LIGER = DEVICE == "cuda" and importlib.util.find_spec("liger_kernel") is not None
OFF_BY = 0.03
"""By how much a step in graphs may take more than is planned; measured."""
TRIED = (
    ("attention", ()),
    ("experts", ()),
    ("experts", ("experts",)),
    ("o_proj", ()),
    ("k_proj", ()),
    ("v_proj", ()),
    ("q_proj", ()),
)
"""What graphs may keep, and what of it they offload then. What saves most time for its memory comes first; experts are
offloaded only if they do not fit otherwise."""
LOSS_CHUNK = 16
"""Liger's loss takes the logits of a chunk of tokens at a time, by itself so few that it reads the output head 64 times
in a step; in chunks 16 times as large it is as fast as a single product."""


@cache
def without_weights(model: str) -> torch.nn.Module:
    """The model that a folder's, or the Hub's, config describes."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), dtype=torch.bfloat16)


def plan_for(options: argparse.Namespace, liger: bool | None = None) -> Plan:
    """What a step of LoRA takes, from the model's config alone, beside what the card has.

    Graphs keep what is sure to fit, in the order of ``TRIED``, unless ``options`` say what they do. What is offloaded
    has to fit into the host's memory too. ``liger``: whether Liger's norms and loss are used; if it is installed.
    """
    model, liger = without_weights(options.model), LIGER if liger is None else liger
    step = Step(
        seq_len=options.seq_len,
        batch_size=options.batch_size,
        rank=options.rank,
        expert_rank=options.expert_rank,
        bits=options.bits,
        checkpointing=options.gradient_checkpointing,
        graphs=options.graphs,
        keep=tuple(options.keep or ()),
        offload=tuple(options.offload),
        chunked_loss=liger or options.trainer == "sft",
        liger=liger,
        byte_permutes=torch.version.hip is None and (DEVICE == "cpu" or torch.cuda.get_device_capability() >= (8, 0)),
    )
    memory = options.gpu_memory * GIB if options.gpu_memory else torch.cuda.get_device_properties(0).total_memory
    plan = make_plan(model, step, memory)
    if options.graphs and options.keep is None:
        for name, offload in TRIED:
            if name not in plan.step.keep:
                offload = (*plan.step.offload, *offload)
                keeps = make_plan(model, replace(step, keep=(*plan.step.keep, name), offload=offload), memory)
                some, fits = keeps.parts[f"kept {name}"], keeps.peak * (1 + OFF_BY) <= memory
                plan = keeps if some and fits and host_has(keeps.host) else plan
    return plan


def cap(memory: float) -> None:
    """Has this process run out of memory where it would on a card with ``memory`` GiB, if this one has more."""
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, memory * GIB - CONTEXT) / total))


def host_has(size: float) -> bool:
    """Whether ``size`` bytes a process are at most half of what the host can pin."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # set by torchrun and accelerate
    return size * processes <= pinnable() / 2


def apply_liger_layers(model: PeftModel) -> None:
    """Liger's norms and rotary embeddings, where it is installed, for a trainer that has a loss of its own."""
    if LIGER:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen3_moe

        apply_liger_kernel_to_qwen3_moe(
            model=model.get_base_model(), swiglu=False, cross_entropy=False, fused_linear_cross_entropy=False
        )


def training_arguments() -> dict:
    """Liger's norms and loss where it is installed; the experts are the kernel's."""
    return {"use_liger_kernel": True, "liger_kernel_config": {"swiglu": False}} if LIGER else {}


def collate_for_liger(rows: list) -> dict:
    """A batch, and what Liger's loss should do with it: never hold all logits, in evaluation neither."""
    return default_data_collator(rows) | {"skip_logits": True, "chunk_mem_const": LOSS_CHUNK}
