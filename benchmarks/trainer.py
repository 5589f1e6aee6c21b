"""What a user's run comes to: examples/finetune.py on a full-width model, and examples/generate.py with its adapter.

    python benchmarks/trainer.py --kernel . --layers 8 --gpu-memory 24

train_step.py times a step alone; here Transformers' Trainer and TRL's SFTTrainer are around it, with their logging,
clipping and loading of data. A checkpoint in bf16 with random weights, 1.3 GB a layer, is made in --checkpoints first,
and stays there. Each script runs in a process of its own, and its table is what is written: to trainer-8-layers.json
and .md, say.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from harness.checkpoint import write_checkpoint
from harness.config import TINY, config
from harness.environment import environment, kernel_identity
from harness.files import made, write_whole
from harness.step import command

from qwen3_moe_integration import KernelSource

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
ROW = re.compile(r"^(\S.{26}\S?) +(\S.*)$", re.MULTILINE)
"""Of a script's table: a name in 28 columns, what it is."""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", type=Path, help="a local build instead of the Hub's")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--checkpoints", type=Path, default=Path("outputs/checkpoints"))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--trainers", nargs="+", choices=["trainer", "sft"], default=["trainer", "sft"])
    parser.add_argument("--new-tokens", type=int, default=64, help="how many to generate")
    parser.add_argument("--gpu-memory", type=float, help="GiB that a run may take, as its plan has it")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: tries this script")
    return parser.parse_args(argv)


def checkpoint(options: argparse.Namespace) -> Path:
    """The folder of the model's files; makes them if they are not there."""
    folder = options.checkpoints / f"qwen3-moe-{options.layers}-layers-text{'-tiny' if options.tiny else ''}"
    return made(folder, make, options.layers, options.tiny)


def make(folder: Path, layers: int, tiny: bool) -> None:
    sys.path.insert(0, str(EXAMPLES))
    from tiny_checkpoint import train_tokenizer

    sizes = config(layers, **TINY if tiny else {})
    write_checkpoint(folder, sizes, "cuda" if torch.cuda.is_available() else "cpu")
    train_tokenizer(min(2048, sizes.vocab_size)).save_pretrained(folder)


def table_of(script: str, *arguments: str | Path) -> dict[str, str]:
    """Runs one of the examples, and reads what it prints at the end."""
    ran = subprocess.run([sys.executable, EXAMPLES / script, *arguments], stdout=subprocess.PIPE, text=True)
    if ran.returncode:
        raise SystemExit(f"{script} {' '.join(map(str, arguments))} failed:\n{ran.stdout}")
    return {name.strip(): value for name, value in ROW.findall(ran.stdout)}


def number(table: dict[str, str], name: str) -> float:
    return float(next(value for key, value in table.items() if key.startswith(name)).split()[0])


def train(options: argparse.Namespace, model: Path, output: Path, trainer: str) -> dict:
    table = table_of(
        *("finetune.py", "--model", model, "--output", output, "--trainer", trainer),
        *("--steps", str(options.steps), "--save-every", str(options.steps), "--seq-len", str(options.seq_len)),
        *_shared(options),
        *(("--gpu-memory", str(options.gpu_memory)) if options.gpu_memory else ()),
    )
    return {
        "what": f"finetune.py --trainer {trainer}",
        "tokens_per_second": number(table, "tokens a second, median"),
        "peak_mib": number(table, "peak"),
        "reserved_mib": number(table, "reserved") if torch.cuda.is_available() else None,
        "loss_before": number(table, "loss before"),
        "loss_after": number(table, "loss after"),
    }


def generate(options: argparse.Namespace, model: Path, adapter: Path | None, compiled: bool) -> dict:
    flags = (*(("--adapter", adapter) if adapter else ()), *(("--compile",) if compiled else ()))
    table = table_of("generate.py", "--model", model, "--tokens", str(options.new_tokens), *flags, *_shared(options))
    kept = [str(flag) for flag in flags if flag != adapter]
    return {
        "what": " ".join(["generate.py", *kept]),
        "tokens_per_second": number(table, "then, tokens a second"),
        "prompt_tokens_per_second": number(table, "prompt, tokens a second"),
        "peak_mib": number(table, "peak"),
    }


def _shared(options: argparse.Namespace) -> tuple[str | Path, ...]:
    return ("--kernel", options.kernel) if options.kernel else ()


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    source = KernelSource(path=options.kernel) if options.kernel else KernelSource()
    result = {
        "command": command("trainer.py", argv),
        "environment": environment("cuda" if torch.cuda.is_available() else "cpu"),
        "kernel": kernel_identity(source.load()),
        "layers": options.layers,
        "seq_len": options.seq_len,
        "runs": [],
    }
    model = checkpoint(options)
    with tempfile.TemporaryDirectory() as folder:
        for trainer in options.trainers:
            record(result, options.out, train(options, model, Path(folder) / trainer, trainer))
        adapter = Path(folder) / options.trainers[0] / "model"
        for chosen, compiled in itertools.product((None, adapter), (False, True)):
            record(result, options.out, generate(options, model, chosen, compiled))


def record(result: dict, folder: Path, run: dict) -> None:
    """Adds a run and writes all there are: what is measured is kept, whatever comes after."""
    result["runs"].append(run)
    print(json.dumps(run), flush=True)
    name = f"trainer-{result['layers']}-layers"
    write_whole(folder / f"{name}.json", json.dumps(result, indent=1) + "\n")
    lines = [f"# {result['layers']} layers, sequences of {result['seq_len']} tokens", "", f"`{result['command']}`", ""]
    lines += [f"{result['environment']['device']}, torch {result['environment']['torch']}", ""]
    lines += ["| | tokens a second | peak GiB | reserved GiB |", "|---|---:|---:|---:|"]
    for run in result["runs"]:
        memory = " | ".join(_gib(run.get(f"{kind}_mib")) for kind in ("peak", "reserved"))
        lines.append(f"| {run['what']} | {run['tokens_per_second']:.0f} | {memory} |")
    write_whole(folder / f"{name}.md", "\n".join(lines) + "\n")


def _gib(mib: float | None) -> str:
    return "" if mib is None else f"{mib / 1024:.2f}"


if __name__ == "__main__":
    main()
