"""Loads a full-width Qwen3-30B-A3B, of as many layers as asked, in 4 bit: seconds, device memory, host memory.

    python benchmarks/loading.py --kernel . --layers 8 --checkpoint /tmp/8-layers
    python benchmarks/loading.py --stock --layers 8 --checkpoint /tmp/8-layers

The checkpoint has the Hub's format: each expert's matrices on their own in bf16, shards of 4 GB, random weights. It is
made if it is not there; without --checkpoint it is made for this run alone. ``from_pretrained`` reads it in a fresh
process, experts and all going to 4 bit; ``save_pretrained`` writes what came of it; another fresh process loads that.
--stock is Transformers' own 4 bit, which leaves experts in bf16.

A run fails if loading takes 1 GiB more of the device than the model does in the end, or of the host 4 GiB more than the
largest shard. What counts of the host is memory that it must have, Python, CUDA and libraries included; pages of mapped
shards, which it can drop, are in "resident". Files are read from the page cache, where they were just written. Writes
loading-*.json as it goes and loading-*.md into --out.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from pathlib import Path

import torch
from harness.checkpoint import SHARD_BYTES, shard_sizes, write_checkpoint
from harness.config import TINY, config
from harness.environment import environment
from harness.files import write_whole
from harness.watch import watch

GIB = 2**30
DEVICE_ROOM, HOST_ROOM = 1 * GIB, 4 * GIB
TINY_SHARD_BYTES = 200_000
IN_4_BIT, STOCK = "bf16 shards, all in 4 bit", "bf16 shards, experts left in bf16"
SAVE, AGAIN = "save_pretrained", "what it saved"


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    result = {
        "command": shlex.join(["python", "benchmarks/loading.py", *argv]),
        "environment": environment(options.device),
        "stock": options.stock,
        "layers": options.layers,
        "complete": False,
        "runs": [],
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.checkpoint or Path(scratch) / "full"
        start = time.perf_counter()
        if not folder.exists():
            sizes = config(options.layers, **TINY if options.tiny else {})
            write_checkpoint(folder, sizes, options.device, TINY_SHARD_BYTES if options.tiny else SHARD_BYTES)
        result["shard_bytes"] = shard_sizes(folder)
        result["seconds_to_make"] = time.perf_counter() - start
        print(f"{len(result['shard_bytes'])} shards, {sum(result['shard_bytes']) / GIB:.1f} GiB", flush=True)
        if options.stock:
            _, load = watch_load(folder, "stock", options)
            add(result, options, STOCK, load)
        else:
            saved = Path(scratch) / "saved"
            _, load, save = watch_load(folder, "ours", options, "--save", str(saved))
            add(result, options, IN_4_BIT, {**load, "room_of": max(result["shard_bytes"])})
            add(result, options, SAVE, {**save, "bytes": sum(shard_sizes(saved))})
            _, load = watch_load(saved, "saved", options)
            add(result, options, AGAIN, {**load, "room_of": max(shard_sizes(saved))})
    result["complete"] = True
    save_results(result, options)
    print(report(result))
    return 1 if result["broken"] else 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", type=Path, help="a local build instead of the Hub's")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--checkpoint", type=Path, help="where the checkpoint is, or is to be")
    parser.add_argument("--stock", action="store_true", help="Transformers' own 4 bit")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: tries this script, on a CPU too")
    return parser.parse_args(argv)


def watch_load(folder: Path, way: str, options: argparse.Namespace, *more: str) -> list[dict]:
    """The phases of a process that loads ``folder``; see harness/load_process.py."""
    kernel = ["--kernel", str(options.kernel)] if options.kernel else []
    return watch("harness.load_process", [str(folder), way, "--device", options.device, *kernel, *more])


def add(result: dict, options: argparse.Namespace, what: str, phase: dict) -> None:
    result["runs"].append({"what": what, **phase})
    result["broken"] = [line for run in result["runs"] for line in broken(run)]
    save_results(result, options)
    print(json.dumps(result["runs"][-1]), flush=True)


def broken(run: dict) -> list[str]:
    """Which bounds a load breaks. ``room_of``: bytes of the largest shard that it read; without it there are none."""
    if "room_of" not in run:
        return []
    found = []
    if "device_peak" in run and run["device_peak"] > run["device_final"] + DEVICE_ROOM:
        found.append(f"{run['what']}: {gib(run, 'device_peak')} GiB of the device for {gib(run, 'device_final')}")
    if run["host_anonymous"] > run["room_of"] + HOST_ROOM:
        found.append(f"{run['what']}: {gib(run, 'host_anonymous')} GiB of the host for shards of {gib(run, 'room_of')}")
    return found


def save_results(result: dict, options: argparse.Namespace) -> None:
    name = f"loading-{options.layers}-layers{'-stock' if options.stock else ''}"
    write_whole(options.out / f"{name}.json", json.dumps(result, indent=1) + "\n")
    write_whole(options.out / f"{name}.md", report(result) + "\n")


def report(result: dict) -> str:
    env, shards = result["environment"], result["shard_bytes"]
    columns = ("device_final", "device_peak", "device_reserved", "host_anonymous", "host_resident")
    lines = [
        f"# Loading {result['layers']} layers of Qwen3-30B-A3B",
        "",
        f"{env['device']}, torch {env['torch']}, transformers {env['transformers']}; {len(shards)} shards, "
        f"{sum(shards) / GIB:.2f} GiB in all, the largest {max(shards) / GIB:.2f}.",
        "",
        f"`{result['command']}`" + ("" if result["complete"] else " - not complete"),
        "",
        "| | s | device GiB | peak | peak reserved | host GiB, anonymous | resident |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for run in result["runs"]:
        lines.append(f"| {run['what']} | {run['seconds']:.1f} | {' | '.join(gib(run, key) for key in columns)} |")
    return "\n".join([*lines, *(f"\n**Too much:** {line}" for line in result["broken"])])


def gib(run: dict, key: str) -> str:
    return f"{run[key] / GIB:.2f}" if key in run else ""


if __name__ == "__main__":
    sys.exit(main())
