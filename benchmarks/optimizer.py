"""8-bit Adam over the adapters of Qwen3-30B-A3B, rank 16 on attention and all experts: by bitsandbytes and as here.

    python benchmarks/optimizer.py --layers 8 48

A row for each optimizer: the kernels' own time a step, by the profiler; that of steps that follow each other; and what
a step takes the host, whose queue is empty when it begins. Writes optimizer.json and optimizer.md into --out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from bitsandbytes.optim import AdamW8bit as BitsandbytesAdam
from harness.environment import environment
from harness.files import write_whole
from harness.measure import synchronize
from harness.step import command
from torch.profiler import ProfilerActivity, profile

from qwen3_moe_integration.optim import AdamW8bit

RANK, EXPERTS, HIDDEN, INTERMEDIATE, QUERY, KEY = 16, 128, 2048, 768, 4096, 512


class WithoutWaits(AdamW8bit):
    """bitsandbytes' kernel, one parameter after the other."""

    def update_step(self, *arguments) -> None:
        BitsandbytesAdam.update_step(self, *arguments)


OPTIMIZERS = {"bitsandbytes": BitsandbytesAdam, "its kernel, without waits": WithoutWaits, "AdamW8bit": AdamW8bit}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 48])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tiny", action="store_true", help="4 experts: tries this script, on a CPU too")
    return parser.parse_args(argv)


def adapters(layers: int, experts: int, device: str) -> list[torch.nn.Parameter]:
    """With gradients; those of experts as PEFT lays them out."""
    stacked = RANK * experts
    shapes = [(stacked, HIDDEN), (2 * INTERMEDIATE, stacked), (stacked, INTERMEDIATE), (HIDDEN, stacked)]
    shapes += [(RANK, HIDDEN)] * 3 + [(RANK, QUERY), (QUERY, RANK), (KEY, RANK), (KEY, RANK), (HIDDEN, RANK)]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    made = [torch.nn.Parameter(0.02 * torch.randn(shape, device=device, dtype=dtype)) for shape in shapes * layers]
    for parameter in made:
        parameter.grad = 1e-3 * torch.randn_like(parameter)
    return made


def measure(kind: type, layers: int, experts: int, steps: int, device: str) -> dict:
    """Milliseconds; those of the kernels are None on a CPU."""
    parameters = adapters(layers, experts, device)
    optimizer = kind(parameters, lr=2e-4)
    for _ in range(4):
        optimizer.step()
    host = []
    for _ in range(steps):
        synchronize(device)
        start = time.perf_counter()
        optimizer.step()
        host.append(time.perf_counter() - start)
    synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        optimizer.step()
    synchronize(device)
    whole = (time.perf_counter() - start) / steps
    kernels = None
    if device == "cuda":
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            for _ in range(steps):
                optimizer.step()
            synchronize(device)
        kernels = sum(event.self_device_time_total for event in seen.key_averages()) / steps / 1e3
    return {
        "layers": layers,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "tensors": len(parameters),
        "kernels_ms": kernels,
        "step_ms": 1e3 * whole,
        "host_ms": 1e3 * statistics.median(host),
    }


def main(argv: list[str] | None = None) -> None:
    options, device = parse(argv), "cuda" if torch.cuda.is_available() else "cpu"
    result = {"command": command("optimizer.py", argv or sys.argv[1:]), "environment": environment(device), "runs": []}
    for layers in options.layers:
        for name, kind in OPTIMIZERS.items():
            run = measure(kind, layers, 4 if options.tiny else EXPERTS, options.steps, device)
            result["runs"].append({"optimizer": name, **run})
    lines = [f"`{result['command']}`", "", f"{result['environment']['device']}, torch {torch.__version__}", ""]
    lines += [
        "| layers | tensors | optimizer | kernels, ms | a step, ms | the host alone, ms |",
        "|---|---|---|---|---|---|",
    ]
    for run in result["runs"]:
        times = (run[f"{kind}_ms"] for kind in ("kernels", "step", "host"))
        cells = " | ".join("" if each is None else f"{each:.2f}" for each in times)
        lines.append(f"| {run['layers']} | {run['tensors']} | {run['optimizer']} | {cells} |")
    write_whole(options.out / "optimizer.json", json.dumps(result, indent=1) + "\n")
    write_whole(options.out / "optimizer.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
