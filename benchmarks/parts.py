"""What the parts around the experts are worth: training steps of Qwen3-30B-A3B with one of them replaced.

    python benchmarks/parts.py --kernel . --layers 8 --tokens 4096 8192

A row for each replacement, all in one process; the last has none. What is not named is as in train_step.py with
--graphs --keep attention experts. Writes parts.json and parts.md into --out, row by row.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import train_step
from harness.config import TINY, config
from harness.environment import environment, kernel_identity
from harness.files import write_whole
from harness.step import adam, command, measure, token_ids, training_step
from torch.nn.attention import SDPBackend, sdpa_kernel

IN_GRAPHS = ["--graphs", "--keep", "attention", "experts"]


class Row(NamedTuple):
    what: str
    flags: list[str]
    """Of train_step.py."""
    around: Callable[[], AbstractContextManager] = nullcontext
    """Around all steps."""
    waits: bool = False
    """Whether Adam is bitsandbytes' own."""


ROWS = [
    # First those without Liger: what it puts in the place of Transformers' functions stays there.
    Row("Transformers' norms, rotary embeddings and loss", [*IN_GRAPHS, "--no-liger"]),
    Row("the same, no graphs, each layer compiled", ["--no-liger", "--compile"]),
    Row("Liger's loss in chunks of its own size", [*IN_GRAPHS, "--loss-chunk", "1"]),
    Row("attention by FlashAttention-2", IN_GRAPHS, lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION)),
    Row("attention's adapters by PEFT", [*IN_GRAPHS, "--peft-attention"]),
    Row("bitsandbytes' Adam", IN_GRAPHS, waits=True),
    Row("nothing kept", ["--graphs"]),
    Row("no graphs", []),
    Row("nothing replaced", IN_GRAPHS),
]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", type=Path, help="a local build instead of the Hub's")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096, 8192])
    parser.add_argument("--steps", type=int, default=10, help="steps of each length, the first three not counted")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, without what a CPU cannot run")
    return parser.parse_args(argv)


def run(row: Row, options: argparse.Namespace, device: str) -> list[dict]:
    """Its steps, of every length."""
    kernel = ["--kernel", str(options.kernel)] if options.kernel else []
    chosen = train_step.parse([*row.flags, "--layers", str(options.layers), *kernel])
    model = train_step.build(chosen, config(options.layers, **TINY if options.tiny else {}), device)
    loss_options = {"chunk_mem_const": chosen.loss_chunk} if chosen.liger else {}
    step = training_step(model, adam(model, device, waits=row.waits), **loss_options)
    runs = []
    for tokens in options.tokens:
        train_step.checkpoint_in_graphs(model, chosen)
        gc.collect()
        with row.around():
            runs.append(measure(step, token_ids(model, tokens), options.steps, device))
    return runs


def table(result: dict) -> str:
    found, lengths = result["environment"], result["tokens"]
    lines = [f"# A training step of {result['layers']} layers, with one part replaced", ""]
    lines += [f"`{result['command']}`", "", f"{found['device']}, torch {found['torch']}", ""]
    lines += ["| | " + " | ".join(f"{n} tokens, ms | peak GiB" for n in lengths) + " |"]
    lines += ["|---|" + "---:|" * 2 * len(lengths)]
    for row in result["rows"]:
        cells = (f"{run['step_ms']:.1f} | {run['peak_gib'] or 0:.2f}" for run in row["runs"])
        lines.append(f"| {row['what']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = {
        "command": command("parts.py", argv or sys.argv[1:]),
        "environment": environment(device),
        "kernel": kernel_identity(train_step.kernel_source(options).load()),
        "layers": options.layers,
        "tokens": options.tokens,
        "rows": [],
    }
    for row in ROWS if device == "cuda" else ROWS[:1]:  # the others want a GPU
        result["rows"].append({"what": row.what, "runs": run(row, options, device)})
        gc.collect()
        write_whole(options.out / "parts.json", json.dumps(result, indent=1) + "\n")
        write_whole(options.out / "parts.md", table(result))
    print(table(result))


if __name__ == "__main__":
    main()
