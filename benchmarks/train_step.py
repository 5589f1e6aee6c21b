"""A whole training step of Qwen3-30B-A3B with as many layers as asked: time, memory, and where the time goes.

    python benchmarks/train_step.py --kernel . --graphs --layers 8 --tokens 1024 4096 8192 --profile 4096
    python benchmarks/train_step.py --kernel . --graphs --keep attention --layers 48 --tokens 4096 --gpu-memory 24
    python benchmarks/train_step.py --kernel . --graphs --keep attention experts --offload experts --tokens 4096 8192
    python benchmarks/train_step.py --stock --layers 8 --tokens 1024 4096 8192

NF4 weights with double quantization, LoRA on attention and all experts, gradient checkpointing, a chunked loss, 8-bit
Adam, one sequence a step. --gpu-memory caps what the process may allocate, less the context, as a card of that size
would. --graphs has layers run in CUDA graphs, which --keep what they are told to from forward to backward; of that,
what --offload names waits in host memory. The same tokens come back every step, so the loss must fall; the run fails if
it does not. --stock is Transformers and PEFT as they are: experts in bf16 by grouped_mm, W + BA built for all of them.
Writes train_step-*.json and train_step-*.md into --out.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import torch
from harness.config import TINY, config
from harness.environment import kernel_identity
from harness.model import random_4_bit_model
from harness.step import GIB, adam, command, results, training_step, write
from harness.training import LOSS_CHUNK, add_lora, apply_liger, checkpointed
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from qwen3_moe_integration import (
    KernelSource,
    enable_fused_linear_lora,
    enable_graphed_checkpointing,
    kernelize_model,
)
from qwen3_moe_integration.kept import KEEPABLE
from qwen3_moe_integration.plan import Step, make_plan

CONTEXT = 0.6


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", type=Path, help="a local build instead of the Hub's")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 4096, 8192])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10, help="steps of each length, the first three not counted")
    parser.add_argument("--gpu-memory", type=float, help="GiB that the card shall seem to have")
    parser.add_argument("--profile", type=int, metavar="TOKENS", help="profile steps of this length too")
    parser.add_argument(
        "--no-liger", dest="liger", action="store_false", help="Transformers' own norms, rotary and loss"
    )
    parser.add_argument("--loss-chunk", type=int, default=LOSS_CHUNK, help="Liger's chunk_mem_const; its own is 1")
    parser.add_argument("--stock", action="store_true", help="Transformers and PEFT without the kernel")
    parser.add_argument("--peft-attention", action="store_true", help="LoRA of attention as PEFT computes it")
    parser.add_argument("--compile", action="store_true", help="compile each decoder layer, whole")
    parser.add_argument("--graphs", action="store_true", help="checkpoint each layer by CUDA graphs")
    parser.add_argument("--keep", nargs="*", choices=KEEPABLE, default=[], help="what graphs keep for backward")
    parser.add_argument("--offload", nargs="*", choices=KEEPABLE, default=[], help="what of --keep waits on the host")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: tries this script, on a CPU too")
    options = parser.parse_args(argv)
    if options.keep and not options.graphs:
        parser.error("--keep is for layers in CUDA graphs; add --graphs")
    if not set(options.offload) <= set(options.keep):
        parser.error("--offload is for what graphs keep; name it in --keep too")
    return options


def kernel_source(options: argparse.Namespace) -> KernelSource:
    return KernelSource(path=options.kernel) if options.kernel else KernelSource()


def build(options: argparse.Namespace, sizes: Qwen3MoeConfig, device: str) -> torch.nn.Module:
    model = random_4_bit_model(sizes, device, experts_in_4_bit=not options.stock)
    if options.liger:
        apply_liger(model)
    if options.stock:
        model.set_experts_implementation("grouped_mm")
    else:
        kernelize_model(model, "training", kernel_source(options))
    layers = model.model.layers
    model = add_lora(checkpointed(model), options.rank)
    if not (options.stock or options.peft_attention):
        enable_fused_linear_lora(model)
    checkpoint_in_graphs(model, options)
    if options.compile:
        for layer in layers:
            layer.compile(fullgraph=True)
    return model


def checkpoint_in_graphs(model: torch.nn.Module, options: argparse.Namespace) -> None:
    """If asked for; graphs that were recorded before are given up."""
    if options.graphs:
        enable_graphed_checkpointing(model, keep=options.keep, offload=options.offload)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.gpu_memory and device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((options.gpu_memory - CONTEXT) * GIB / total)
    started = time.perf_counter()
    sizes = config(options.layers, **TINY) if options.tiny else config(options.layers)
    with torch.device("meta"):
        in_full = Qwen3MoeForCausalLM(sizes)
    model = build(options, sizes, device)
    built = time.perf_counter() - started
    loss_options = {"chunk_mem_const": options.loss_chunk} if options.liger else {}
    step = training_step(model, adam(model, device, waits=options.stock), **loss_options)
    result = results(model, step, options, device, built, renew=partial(checkpoint_in_graphs, model, options))
    result |= {"command": command("train_step.py", argv or sys.argv[1:]), "stock": options.stock}
    result["kernel"] = None if options.stock else kernel_identity(kernel_source(options).load())
    for run in result["runs"] if not options.stock else ():
        run["planned_gib"] = planned_gib(in_full, options, run["tokens"])
    write(result, options.out, f"train_step-{options.layers}-layers{kind(options)}")


def planned_gib(model: torch.nn.Module, options: argparse.Namespace, tokens: int) -> float:
    """What a step of ``model``, whose weights may be on the meta device, is planned to take, less the CUDA context."""
    step = Step(
        tokens,
        rank=options.rank,
        expert_rank=options.rank,
        liger=options.liger,
        chunked_loss=options.liger,
        graphs=options.graphs,
        keep=tuple(options.keep),
        offload=tuple(options.offload),
    )
    plan = make_plan(model, step, 24 * GIB)
    return (plan.peak - plan.parts["CUDA context"]) / GIB


def kind(options: argparse.Namespace) -> str:
    """What tells a run's files from those of others with as many layers."""
    flags = {
        "stock": options.stock,
        "graphs": options.graphs,
        "keep": options.keep,
        "offload": options.offload,
        "no-liger": not options.liger,
        "loss-chunk": options.loss_chunk != LOSS_CHUNK and [str(options.loss_chunk)],
        "peft-attention": options.peft_attention,
        "compile": options.compile,
    }
    words = ([name, *(value if isinstance(value, list) else ())] for name, value in flags.items() if value)
    return "".join(f"-{word}" for each in words for word in each)


if __name__ == "__main__":
    main()
