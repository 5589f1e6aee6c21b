"""A whole training step of Qwen3-30B-A3B with as many layers as asked: time, memory, and where the time goes.

    python benchmarks/train_step.py --kernel . --layers 8 --tokens 1024 4096 8192 --profile 4096
    python benchmarks/train_step.py --kernel . --layers 48 --tokens 4096 --steps 20 --gpu-memory 24
    python benchmarks/train_step.py --stock --layers 8 --tokens 1024 4096 8192

NF4 weights with double quantization, LoRA on attention and all experts, gradient checkpointing, a chunked loss, 8-bit
Adam, one sequence a step. --gpu-memory caps what the process may allocate, less the context, as a card of that size
would. The same tokens come back every step, so the loss must fall; the run fails if it does not. --stock is
Transformers and PEFT as they are: experts in bf16 by grouped_mm, W + BA built for all of them. Writes
train_step-*.json and train_step-*.md into --out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import bitsandbytes
import torch
from harness.environment import environment
from harness.measure import synchronize
from harness.model import TINY, config, random_4_bit_model
from harness.training import LOSS_CHUNK, add_lora, apply_liger, checkpointed
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from qwen3_moe_integration import KernelSource, kernelize_model
from qwen3_moe_integration.plan import Step, make_plan

GIB = 2**30
CONTEXT = 0.6
WARM_UP = 3


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
    parser.add_argument("--compile", action="store_true", help="compile each decoder layer, whole")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: tries this script, on a CPU too")
    return parser.parse_args(argv)


def build(options: argparse.Namespace, sizes: Qwen3MoeConfig, device: str) -> torch.nn.Module:
    model = random_4_bit_model(sizes, device, experts_in_4_bit=not options.stock)
    if options.liger:
        apply_liger(model)
    if options.stock:
        model.set_experts_implementation("grouped_mm")
    else:
        kernelize_model(model, "training", KernelSource(path=options.kernel) if options.kernel else KernelSource())
    layers = model.model.layers
    model = add_lora(checkpointed(model), options.rank)
    if options.compile:
        for layer in layers:
            layer.compile(fullgraph=True)
    return model


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
    trained = [p for p in model.parameters() if p.requires_grad]
    adam = bitsandbytes.optim.AdamW8bit if device == "cuda" else torch.optim.AdamW
    optimizer = adam(trained, lr=2e-4)
    loss_options = {"chunk_mem_const": options.loss_chunk} if options.liger else {}

    def step(ids: torch.Tensor) -> torch.Tensor:
        loss = model(input_ids=ids, labels=ids, **loss_options).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    runs = []
    for tokens in options.tokens:
        ids = torch.randint(model.config.vocab_size, (1, tokens), device=device)
        run = measure(step, ids, options.steps, device)
        if not run["last_loss"] < run["first_loss"]:
            raise SystemExit(f"{tokens} tokens: the loss did not fall: {run['first_loss']} to {run['last_loss']}")
        if not options.stock:
            wanted = Step(tokens, rank=options.rank, expert_rank=options.rank, liger=options.liger)
            planned = make_plan(in_full, replace(wanted, chunked_loss=options.liger), 24 * GIB)
            run["planned_gib"] = (planned.peak - planned.parts["CUDA context"]) / GIB
        runs.append({"tokens": tokens, **run})
        print(json.dumps(runs[-1]), flush=True)
    result = {
        "command": command(argv or sys.argv[1:]),
        "environment": environment(device),
        "stock": options.stock,
        "layers": options.layers,
        "rank": options.rank,
        "trained_parameters": sum(p.numel() for p in trained),
        "seconds_to_build": built,
        "runs": runs,
    }
    if options.profile:
        ids = torch.randint(model.config.vocab_size, (1, options.profile), device=device)
        result["profile"] = {"tokens": options.profile, **profiled(step, ids, device)}
    write(result, options.out)


def command(arguments: list[str]) -> str:
    """The line that started this, less where the results went."""
    kept = list(arguments)
    if "--out" in kept:
        at = kept.index("--out")
        del kept[at : at + 2]
    return " ".join(["python", "benchmarks/train_step.py", *kept])


def measure(step, ids: torch.Tensor, steps: int, device: str) -> dict:
    """Milliseconds a step, tokens a second, peak memory, and the losses at both ends."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times, losses = [], []
    for _ in range(steps):
        synchronize(device)
        start = time.perf_counter()
        losses.append(step(ids))
        synchronize(device)
        times.append(time.perf_counter() - start)
    median = statistics.median(times[min(WARM_UP, steps - 1) :])
    return {
        "first_step_s": times[0],
        "step_ms": median * 1e3,
        "tokens_per_second": ids.numel() / median,
        "peak_gib": torch.cuda.max_memory_allocated() / GIB if device == "cuda" else None,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB if device == "cuda" else None,
        "first_loss": losses[0].item(),
        "last_loss": losses[-1].item(),
    }


def profiled(step, ids: torch.Tensor, device: str, steps: int = 3) -> dict:
    """Time of every kernel a step, longest first, and the share of the time in which the GPU ran none."""
    step(ids)
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    synchronize(device)
    with profile(activities=[activity]) as recorded:
        start = time.perf_counter()
        for _ in range(steps):
            step(ids)
        synchronize(device)
        elapsed = time.perf_counter() - start
    spent = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    events = sorted(recorded.key_averages(), key=lambda event: -getattr(event, spent))
    busy = sum(getattr(event, spent) for event in events) / steps
    kernels = [
        {"name": event.key, "launches": event.count / steps, "us": getattr(event, spent) / steps}
        for event in events
        if getattr(event, spent)
    ]
    return {
        "step_us": elapsed / steps * 1e6,
        "busy_us": busy,
        "idle": 1 - busy / (elapsed / steps * 1e6),
        "kernels": kernels,
    }


def write(result: dict, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = f"train_step-{result['layers']}-layers{'-stock' if result['stock'] else ''}"
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    lines = [
        f"# Training step, {result['layers']} layers, LoRA rank {result['rank']}",
        "",
        f"`{result['command']}`",
        "",
    ]
    lines += [f"{result['environment']['device']}, torch {result['environment']['torch']}", ""]
    lines += [
        "| tokens | ms a step | tokens a second | peak GiB | reserved GiB | planned GiB | first step, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in result["runs"]:
        memory = (run.get(f"{kind}_gib") for kind in ("peak", "reserved", "planned"))
        sizes = " | ".join(f"{size:.2f}" if size else "" for size in memory)
        lines.append(
            f"| {run['tokens']} | {run['step_ms']:.1f} | {run['tokens_per_second']:.0f} | {sizes} "
            f"| {run['first_step_s']:.1f} |"
        )
    if "profile" in result:
        found = result["profile"]
        lines += ["", f"## {found['tokens']} tokens: {found['step_us'] / 1e3:.1f} ms, GPU idle {found['idle']:.0%}", ""]
        lines += ["| launches | us | share | what |", "| ---: | ---: | ---: | --- |"]
        for row in found["kernels"][:40]:
            share = row["us"] / found["busy_us"]
            lines.append(f"| {row['launches']:g} | {row['us']:.0f} | {share:.0%} | {row['name'][:100]} |")
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines[:60]))


if __name__ == "__main__":
    main()
