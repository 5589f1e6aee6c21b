"""Whole training steps: what one does, how it is timed and profiled, and what is written of it.

The same tokens come back every step, so the loss must fall.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path
from typing import Any, Callable

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from .environment import environment
from .files import write_whole
from .measure import synchronize

GIB = 2**30
WARM_UP = 3
Step = Callable[[torch.Tensor], torch.Tensor]


def adam(model: nn.Module, device: str, waits: bool = True) -> torch.optim.Optimizer:
    """Of the parameters that are trained, with 8-bit states on a GPU: bitsandbytes' own, which ``waits`` for the GPU
    after each parameter, or the integration's."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if device != "cuda":
        return torch.optim.AdamW(trained, lr=2e-4)
    if waits:
        from bitsandbytes.optim import AdamW8bit
    else:
        from qwen3_moe_integration.optim import AdamW8bit
    return AdamW8bit(trained, lr=2e-4)


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, **loss_options: Any) -> Step:
    """From token ids (1, T) to the loss, with the parameters changed."""

    def step(ids: torch.Tensor) -> torch.Tensor:
        loss = model(input_ids=ids, labels=ids, **loss_options).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def token_ids(model: nn.Module, tokens: int) -> torch.Tensor:
    """Random, (1, tokens)."""
    return torch.randint(model.config.vocab_size, (1, tokens), device=next(model.parameters()).device)


def command(script: str, arguments: list[str]) -> str:
    """The line that started this, less where the results went."""
    kept = list(arguments)
    if "--out" in kept:
        at = kept.index("--out")
        del kept[at : at + 2]
    return " ".join(["python", f"benchmarks/{script}", *kept])


def measure(step: Step, ids: torch.Tensor, steps: int, device: str) -> dict:
    """Milliseconds a step, tokens a second, peak memory, and the losses at both ends.

    Steps that count follow each other as in training, where nothing waits for the GPU between them.

    Raises:
        SystemExit: the loss did not fall, so what was measured is no training.
    """
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    warm_up, times, losses = min(WARM_UP, steps - 1), [], []
    for count in [1] * warm_up + [steps - warm_up]:
        synchronize(device)
        start = time.perf_counter()
        losses += [step(ids) for _ in range(count)]
        synchronize(device)
        times.append((time.perf_counter() - start) / count)
    if not losses[-1] < losses[0]:
        raise SystemExit(f"{ids.numel()} tokens: the loss did not fall: {losses[0].item()} to {losses[-1].item()}")
    return {
        "tokens": ids.numel(),
        "first_step_s": times[0],
        "step_ms": times[-1] * 1e3,
        "tokens_per_second": ids.numel() / times[-1],
        "peak_gib": torch.cuda.max_memory_allocated() / GIB if device == "cuda" else None,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB if device == "cuda" else None,
        "first_loss": losses[0].item(),
        "last_loss": losses[-1].item(),
    }


def results(
    model: nn.Module,
    step: Step,
    options: argparse.Namespace,
    device: str,
    built: float,
    renew: Callable[[], None] = lambda: None,
) -> dict:
    """Runs every length that ``options.tokens`` names, printing as it goes, and profiles ``options.profile``.

    Args:
        built: how many seconds the model took to make.
        renew: gives up what a length has left that another has no use for, such as graphs of its shape.
    """
    runs = []
    for tokens in options.tokens:
        renew()
        gc.collect()
        runs.append(measure(step, token_ids(model, tokens), options.steps, device))
        print(json.dumps(runs[-1]), flush=True)
    result = {
        "environment": environment(device),
        "layers": options.layers,
        "rank": options.rank,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "seconds_to_build": built,
        "runs": runs,
    }
    if options.profile:
        renew()
        result["profile"] = profiled(step, token_ids(model, options.profile), device)
    return result


def profiled(step: Step, ids: torch.Tensor, device: str, steps: int = 3) -> dict:
    """Time of every kernel a step, longest first, and the share of a step in which the GPU runs none.

    A step's time is taken without the profiler, which makes every launch slower.
    """
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    elapsed = measure(step, ids, WARM_UP + 2 * steps, device)["step_ms"] * 1e3
    with profile(activities=[activity]) as recorded:
        for _ in range(steps):
            step(ids)
        synchronize(device)
    spent = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    events = sorted(recorded.key_averages(), key=lambda event: -getattr(event, spent))
    total = sum(getattr(event, spent) for event in events) / steps
    spans = [(each.time_range.start, each.time_range.end) for each in recorded.events() if _is_on(each, device)]
    busy = _covered(spans) / steps
    kernels = [
        {"name": event.key, "launches": event.count / steps, "us": getattr(event, spent) / steps}
        for event in events
        if getattr(event, spent)
    ]
    return {
        "tokens": ids.numel(),
        "step_us": elapsed,
        "busy_us": busy,
        "kernels_us": total,
        "idle": 1 - busy / elapsed,
        "kernels": kernels,
    }


def _is_on(event: FunctionEvent, device: str) -> bool:
    return event.device_type == (DeviceType.CUDA if device == "cuda" else DeviceType.CPU)


def _covered(spans: list[tuple[float, float]]) -> float:
    """How long at least one of them lasts: copies run beside kernels."""
    covered, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered


def write(result: dict, folder: Path, name: str) -> None:
    """Into ``name``.json and, as tables, ``name``.md; prints the tables."""
    write_whole(folder / f"{name}.json", json.dumps(result, indent=1) + "\n")
    lines = [
        f"# Training step, {result['layers']} layers, LoRA rank {result['rank']}",
        "",
        f"`{result['command']}`",
        "",
    ]
    lines += [f"{result['environment']['device']}, torch {result['environment']['torch']}", ""]
    lines += [
        "| tokens | ms per step | tokens a second | peak GiB | reserved GiB | planned GiB | first step, s |",
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
            share = row["us"] / found["kernels_us"]
            lines.append(f"| {row['launches']:g} | {row['us']:.0f} | {share:.0%} | {row['name'][:100]} |")
    write_whole(folder / f"{name}.md", "\n".join(lines) + "\n")
    print("\n".join(lines[:60]))
