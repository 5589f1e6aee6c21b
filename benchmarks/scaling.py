"""Tokens a second, scaling efficiency and peak memory of every engine, on whatever GPUs there are.

    torchrun --nproc-per-node=2 benchmarks/scaling.py --kernel . --layers 4 --out benchmarks/results/h100-x2

Runs on one GPU too, and without any, over gloo, with --tiny. Every rank trains on one sequence a step, with gradient
checkpointing, LoRA engines with Liger where it is installed. The efficiency of LoRA engines is their tokens a second
divided by those of as many GPUs alone, which are timed in the same run; that of the engines that train all weights is
relative to FSDP2. A step takes as long as its slowest rank; peak memory is that of the steps alone, the first included.
Writes scaling.json and scaling.md into --out.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch
from harness.config import TINY, config
from harness.engines import ENGINES, build, loss_options
from harness.environment import environment, kernel_identity
from harness.files import write_whole
from harness.measure import synchronize
from torch import distributed

from qwen3_moe_integration import KernelSource

GIB = 2**30
WARM_UP = 2


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", type=Path, help="a local build instead of the Hub's")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096, help="of a sequence")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA on attention and all experts")
    parser.add_argument("--graphs", action="store_true", help="layers of alone, ddp and experts in CUDA graphs")
    parser.add_argument("--steps", type=int, default=8, help="the first two are not counted")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: tries this script, on a CPU too")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else argv
    options = parse(arguments)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not distributed.is_initialized():
        distributed.init_process_group(device_id=device if device.type == "cuda" else None)
    ranks = distributed.get_world_size()
    kernel = KernelSource(path=options.kernel) if options.kernel else KernelSource()
    runs = []
    for engine in options.engines:
        runs.append({"engine": engine, **run(engine, kernel, options, device)})
        if distributed.get_rank() == 0:
            print(json.dumps(runs[-1]), flush=True)
    add_efficiency(runs)
    if distributed.get_rank() == 0:
        write(
            {
                "command": shlex.join(["torchrun", f"--nproc-per-node={ranks}", "benchmarks/scaling.py", *arguments]),
                "environment": environment(device.type),
                "kernel": kernel_identity(kernel.load()),
                "ranks": ranks,
                "layers": options.layers,
                "tokens": options.tokens,
                "rank": options.rank,
                "graphs": options.graphs,
                "runs": runs,
            },
            options.out,
        )
    distributed.destroy_process_group()


def run(engine: str, kernel: KernelSource, options: argparse.Namespace, device: torch.device) -> dict:
    """Times one engine; what it held is free again afterwards."""
    sizes = config(options.layers, **TINY if options.tiny else {})
    # FSDP2 holds on to the modules that it has sharded.
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    model = build(engine, sizes, options.rank, kernel, device, options.graphs)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    torch.manual_seed(distributed.get_rank())
    ids = torch.randint(sizes.vocab_size, (1, options.tokens), device=device)
    options_of_loss = loss_options(engine, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times, losses = [], []
    for _ in range(options.steps):
        distributed.barrier()
        synchronize(device.type)
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids, **options_of_loss).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        del loss
        synchronize(device.type)
        times.append(time.perf_counter() - start)
    slowest = largest(torch.tensor(times, dtype=torch.float64, device=device))
    seconds = statistics.median(slowest[min(WARM_UP, options.steps - 1) :])
    peak = torch.cuda.max_memory_allocated() - before if device.type == "cuda" else 0
    (peak,) = largest(torch.tensor([peak], dtype=torch.float64, device=device))
    first, last = (loss.item() for loss in (losses[0], losses[-1]))
    if not last < first:
        raise SystemExit(f"{engine}: the loss did not fall: {first} to {last}")
    del model, optimizer, trained, losses
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return {
        "step_ms": 1e3 * seconds,
        "tokens_per_second": distributed.get_world_size() * options.tokens / seconds,
        "peak_gib": peak / GIB if peak else None,
        "first_loss": first,
        "last_loss": last,
    }


def largest(values: torch.Tensor) -> list[float]:
    """Of all ranks, entry by entry."""
    distributed.all_reduce(values, distributed.ReduceOp.MAX)
    return values.tolist()


def add_efficiency(runs: list[dict]) -> None:
    """Relative to "alone" for engines that train adapters, to "whole" for those that train everything."""
    speeds = {run["engine"]: run["tokens_per_second"] for run in runs}
    for run in runs:
        base = "whole" if run["engine"] in ("whole", "ep") else "alone"
        run["relative_to"], run["efficiency"] = base, None
        if base in speeds:
            run["efficiency"] = run["tokens_per_second"] / speeds[base]


def write(result: dict, folder: Path) -> None:
    env = result["environment"]
    lines = [
        f"{result['ranks']} x {env['device']}, torch {env['torch']}; {result['layers']} layers of Qwen3-30B-A3B, "
        f"{result['tokens']} tokens per rank and step, LoRA rank {result['rank']}.",
        "",
        f"`{result['command']}`",
        "",
        "| engine | ms per step | tokens a second | efficiency | relative to | peak GiB |",
        "| --- | ---: | ---: | ---: | --- | ---: |",
    ]
    for run in result["runs"]:
        efficiency = "" if run["efficiency"] is None else f"{run['efficiency']:.0%}"
        peak = "" if run["peak_gib"] is None else f"{run['peak_gib']:.2f}"
        lines.append(
            f"| {run['engine']} | {run['step_ms']:.1f} | {run['tokens_per_second']:.0f} | {efficiency} "
            f"| {run['relative_to']} | {peak} |"
        )
    write_whole(folder / "scaling.json", json.dumps(result, indent=1) + "\n")
    write_whole(folder / "scaling.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
