"""How far a model in bf16 is from fp64, in its logits and all gradients: with its experts on the kernel, and in stock.

    python benchmarks/model_error.py --kernel . --out benchmarks/results/nvidia-h200

Layers as wide as Qwen3-30B-A3B's, with few experts, of which every token takes all: near a tie a router in bf16 would
take other experts than one in fp64, whoever computes them, and that alone would be measured. The reference is the same
model, with the same weights, in fp64 on Transformers' loop over experts. An error is a ratio of norms. Each seed draws
weights and tokens, and has an error of its own. Of two correct ways to round now one is further from fp64, now the
other, so they are compared seed by seed, and what tells them apart is the mean beside its standard error.

Writes model_error.json and model_error.md into --out. Fails if the kernel is further from fp64 than stock, and chance
does not explain it: by more than CHANCE standard errors.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
from pathlib import Path

import torch
from harness.config import TINY, config
from harness.environment import environment, kernel_identity
from harness.files import write_whole
from harness.step import command
from torch import nn
from transformers import AutoModelForCausalLM

from qwen3_moe_integration import KernelSource, kernelize_model

CHANCE = 3
"""Were both as far in everything, one table in fifty would fail by it, at 16 seeds."""
SIDES = "kernel", "stock"
Errors = dict[str, dict[str, list[float]]]
"""By what is compared, then by side: one of each seed."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", type=Path, help="a local build instead of the Hub's")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--stock", default="grouped_mm", help="Transformers' experts_implementation to compare with")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--tiny", action="store_true", help="narrow layers: tries this script, on a CPU too")
    options = parser.parse_args(argv)
    if options.seeds < 2:
        parser.error("--seeds must be at least 2: one alone has no standard error")
    return options


def main(argv: list[str] | None = None) -> None:
    options, device = parse(argv), "cuda" if torch.cuda.is_available() else "cpu"
    source = KernelSource(path=options.kernel) if options.kernel else KernelSource()
    found: Errors = {}
    for seed in range(options.seeds):
        for kind, pair in errors(options, source, device, seed).items():
            for side, error in zip(SIDES, pair):
                found.setdefault(kind, {}).setdefault(side, []).append(error)
    result = {
        "command": command("model_error.py", sys.argv[1:] if argv is None else argv),
        "environment": environment(device),
        "kernel": kernel_identity(source.load()),
        "summary": {kind: summary(sides) for kind, sides in found.items()},
        "errors": found,
    }
    text = table(result)
    write_whole(options.out / "model_error.json", json.dumps(result, indent=1) + "\n")
    write_whole(options.out / "model_error.md", text)
    print(text)
    if worse := further(result["summary"]):
        raise SystemExit(f"further from fp64 than stock, beyond chance: {', '.join(worse)}")


def errors(options: argparse.Namespace, source: KernelSource, device: str, seed: int) -> dict[str, tuple[float, float]]:
    """Of each kind of result: the kernel's error and that of stock."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 8192, **(TINY if options.tiny else {})}
    sizes |= {"num_experts": options.experts, "num_experts_per_tok": options.experts}
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config(options.layers, **sizes), dtype=torch.bfloat16)
        ids = torch.randint(model.config.vocab_size, (options.batch_size, options.seq_len))
    want = results(twin(model, "eager").double(), ids)
    stock = distances(results(twin(model, options.stock), ids), want)
    kernel = distances(results(kernelize_model(model, "training", source), ids), want)
    return {kind: (kernel[kind], stock[kind]) for kind in want}


def twin(model: nn.Module, implementation: str) -> nn.Module:
    """The same weights on Transformers' own experts."""
    other = copy.deepcopy(model)
    other.set_experts_implementation(implementation)
    return other


def results(model: nn.Module, ids: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    """Logits, and the gradients of the experts, of the routers and of all else."""
    out = model(input_ids=ids, labels=ids, use_cache=False)
    out.loss.backward()
    gradients = {"experts": [], "routers": [], "the rest": []}
    for name, parameter in model.named_parameters():
        kind = "experts" if ".experts." in name else "routers" if ".gate." in name else "the rest"
        gradients[kind].append(parameter.grad)
    return {"logits": [out.logits.detach()], **{f"gradients of {kind}": each for kind, each in gradients.items()}}


def distances(got: dict[str, list[torch.Tensor]], want: dict[str, list[torch.Tensor]]) -> dict[str, float]:
    """Norm of the difference over that of the reference, the tensors of a kind taken as one vector."""

    def norm(tensors: list[torch.Tensor]) -> float:
        return math.sqrt(sum(tensor.square().sum().item() for tensor in tensors))

    return {kind: norm([a.double() - b for a, b in zip(got[kind], ref)]) / norm(ref) for kind, ref in want.items()}


def summary(sides: dict[str, list[float]]) -> dict[str, float]:
    """Mean and worst of both, and ``excess``: the mean of the logarithm of the kernel's over stock's of a seed."""
    ours, theirs = (torch.tensor(sides[side], dtype=torch.float64) for side in SIDES)
    excess = (ours / theirs).log()
    return {
        **{f"{side}_mean": statistics.fmean(sides[side]) for side in SIDES},
        **{f"{side}_worst": max(sides[side]) for side in SIDES},
        "excess": excess.mean().item(),
        "excess_standard_error": excess.std().item() / math.sqrt(len(excess)),
    }


def further(summaries: dict[str, dict[str, float]]) -> list[str]:
    """The kinds of results in which the kernel is further from fp64 than stock, beyond chance."""
    return [kind for kind, each in summaries.items() if not each["excess"] <= CHANCE * each["excess_standard_error"]]


def table(result: dict) -> str:
    env = result["environment"]
    lines = [f"`{result['command']}`", "", f"{env['device']}, torch {env['torch']}, transformers {env['transformers']}"]
    lines += ["", "| error against fp64, mean (worst) of the seeds | kernel | stock | kernel / stock |"]
    lines += ["|---|---:|---:|---:|"]
    for kind, each in result["summary"].items():
        cells = [f"{each[f'{side}_mean']:.3e} ({each[f'{side}_worst']:.3e})" for side in SIDES]
        cells.append(f"{math.exp(each['excess']):.4f} ± {each['excess_standard_error']:.4f}")
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
