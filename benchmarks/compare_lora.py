"""Times forward and backward of the layer with an adapter on each expert: what it costs over the frozen layer, and
against one grouped_mm a matrix, which is how others run it.

Each result, every gradient included, is checked against fp64 before it is timed. Writes compare-lora.json and
compare-lora.md into --out; benchmarks/README.md says how times are taken.

    python benchmarks/compare_lora.py --kernel . --out benchmarks/results/h200
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from harness.adapters import Factors, Layer, as_peft_stores_them, make_factors, ours, reference, run, split
from harness.contest import attempt
from harness.environment import environment, kernel_identity
from harness.files import write_whole
from harness.measure import poison_free_memory, repeats, summary, time_calls, time_graph, wall_time
from harness.peers import load_kernel
from harness.problem import TOLERANCE, Shape, Weights, make_inputs, make_weights, relative_error, train_weights

SCALING = 2.0
FROZEN, ADAPTED, AS_PEFT, SPLIT = "ours, frozen", "ours", "ours, fp32 factors as PEFT stores them", "grouped_mm, split"
HALVES = "ours, gate and up with an A each"
FROZEN_4BIT, ADAPTED_4BIT = "ours, frozen nf4", "ours, nf4"
AS_PEFT_4BIT = "ours, nf4, fp32 factors as PEFT stores them"


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    results = {
        "command": shlex.join(["python", "benchmarks/compare_lora.py", *argv]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "complete": False,
        "environment": environment(options.device),
        "dtype": "bfloat16",
        "shape": asdict(options.shape),
        "rank": options.rank,
        "layer": [],
    }
    kernel = load_kernel(options.kernel)
    results["kernel"] = kernel_identity(kernel)
    weights = make_weights(options.shape, torch.bfloat16, options.device)
    train_weights(weights, False)
    for tokens in options.tokens:
        results["layer"] += contest(kernel, weights, tokens, options)
        save(results, options.out)
        times = (f"{r['peer']} {brief(r)}" for r in results["layer"] if r["tokens"] == tokens)
        print(f"{tokens} tokens, ms: {', '.join(times)}", flush=True)
    results["complete"] = True
    save(results, options.out)
    print(report(results))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", type=Path, help="a local build (the folder that holds build/) instead of the Hub's")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--tokens", nargs="+", type=int, default=[128, 1024, 4096, 16384])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--four-bit", action="store_true", help="over nf4 experts too (wants bitsandbytes)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--input-sets", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget-ms", type=float, default=200.0)
    parser.add_argument("--quick", action="store_true", help="a tiny layer: tests this script, no more")
    options = parser.parse_args(argv)
    options.shape = Shape(64, 32, 8, 2) if options.quick else Shape()
    return options


def contest(kernel, weights: Weights, tokens: int, options: argparse.Namespace) -> list[dict]:
    """A record for each way to run ``tokens`` tokens: checked, then timed in turns, then in a CUDA graph."""
    sets = [make_inputs(options.shape, tokens, torch.bfloat16, options.device, s) for s in range(options.input_sets)]
    calls, records = {}, []
    for name, (layer, trained, base) in contestants(kernel, weights, options).items():
        calls[name] = [partial(run, layer, inputs, trained) for inputs in sets]
        wanted = reference(sets[0], base, trained, SCALING)
        errors, reason = attempt(partial(check, calls[name][0], wanted), options.device)
        worst = max(errors.values()) if errors else None
        if reason is None and not worst <= TOLERANCE[torch.bfloat16]:
            reason = f"wrong: {errors}"
        records.append({"tokens": tokens, "peer": name, "errors": errors, "reason": reason})
        torch.cuda.empty_cache()
    running = [record for record in records if record["reason"] is None]
    samples = {record["peer"]: [] for record in running}
    for turn in range(options.rounds):
        for i in range(len(running)):
            name = running[(i + turn) % len(running)]["peer"]
            count = repeats(options.budget_ms / options.rounds, 1e3 * wall_time(calls[name][0], options.device))
            samples[name].append(time_calls(calls[name], count, options.device))
    for record in running:
        record["call_ms"] = summary(samples[record["peer"]])
        if options.device == "cuda":
            graph, record["graph_reason"] = attempt(
                partial(time_graph, calls[record["peer"]], options.budget_ms), options.device
            )
            record["graph_ms"] = summary([graph]) if graph else None
    return records


def contestants(
    kernel, weights: Weights, options: argparse.Namespace
) -> dict[str, tuple[Layer, Factors | None, Weights]]:
    """By name: the layer, the factors it trains, and the dense weights that it stands for without them."""
    factors = make_factors(options.shape, options.rank, torch.bfloat16, options.device)
    halves = make_factors(options.shape, options.rank, torch.bfloat16, options.device, halves=2)
    peft = as_peft_stores_them(factors)
    layers = {
        FROZEN: (ours(kernel, weights, None, SCALING), None, weights),
        ADAPTED: (ours(kernel, weights, factors, SCALING), factors, weights),
        AS_PEFT: (ours(kernel, weights, peft, SCALING), peft, weights),
        HALVES: (ours(kernel, weights, halves, SCALING), halves, weights),
        SPLIT: (split(weights, factors, SCALING), factors, weights),
    }
    if options.four_bit:
        packed, dense = quantized(kernel, weights)
        layers[FROZEN_4BIT] = ours(kernel, packed, None, SCALING), None, dense
        layers[ADAPTED_4BIT] = ours(kernel, packed, factors, SCALING), factors, dense
        layers[AS_PEFT_4BIT] = ours(kernel, packed, peft, SCALING), peft, dense
    return layers


def check(call, wanted: dict[str, torch.Tensor]) -> dict[str, float]:
    poison_free_memory(wanted.values(), torch.bfloat16)
    return {name: relative_error(result, wanted[name]) for name, result in call().items()}


def quantized(kernel, weights: Weights) -> tuple[tuple, Weights]:
    """Both stacks in nf4 with nested statistics, and what they stand for."""
    import bitsandbytes.functional as bnb
    from bitsandbytes.nn import Params4bit

    packed = []
    for weight in weights:
        data, state = bnb.quantize_4bit(weight.detach(), blocksize=64, compress_statistics=True, quant_type="nf4")
        parameter = Params4bit(data, requires_grad=False, quant_state=state, bnb_quantized=True)
        packed.append(kernel.four_bit_weight(parameter))
    return tuple(packed), Weights(*map(kernel.dequantize, packed))


def brief(record: dict) -> str:
    graph = record.get("graph_ms")
    return record["reason"] or f"{record['call_ms']['median']:.3f} ({graph['median'] if graph else 0:.3f})"


def save(results: dict, folder: Path) -> None:
    write_whole(folder / "compare-lora.json", json.dumps(results, indent=1))
    write_whole(folder / "compare-lora.md", report(results))


def report(results: dict) -> str:
    env, shape = results["environment"], results["shape"]
    parts = [
        f"{env['device']}, torch {env['torch']}, triton {env['triton']}; bf16, H {shape['hidden']}, "
        f"I {shape['intermediate']}, E {shape['experts']}, top-{shape['top_k']}, rank {results['rank']} on both "
        "projections. Forward and backward, gradients of hidden states, routing weights and, with adapters, factors.",
        f"`{results['command']}`" + ("" if results["complete"] else " - not complete: it was interrupted"),
    ]
    for key, title in (("call_ms", "Milliseconds a call"), ("graph_ms", "Milliseconds in a CUDA graph")):
        parts.append(f"## {title}\n\n{table(results['layer'], key)}")
    reasons = [f"- {r['peer']}, {r['tokens']} tokens: {r['reason']}" for r in results["layer"] if r["reason"]]
    return "\n\n".join(parts + reasons) + "\n"


def table(records: list[dict], key: str) -> str:
    tokens = sorted({record["tokens"] for record in records})
    found = {(r["peer"], r["tokens"]): r[key]["median"] for r in records if r.get(key)}
    peers = list(dict.fromkeys(record["peer"] for record in records))
    rows = [["", *map(str, tokens)], ["---", *["---:"] * len(tokens)]]
    rows += [[peer, *(f"{found[peer, t]:.3f}" if (peer, t) in found else "" for t in tokens)] for peer in peers]
    ratios = [(f"**{a} over {FROZEN}**", a, FROZEN) for a in (ADAPTED, AS_PEFT)]
    ratios += [(f"**{ADAPTED_4BIT} over {FROZEN_4BIT}**", ADAPTED_4BIT, FROZEN_4BIT)]
    ratios += [(f"**{SPLIT} over {ADAPTED}**", SPLIT, ADAPTED)]
    for title, a, b in ratios:
        values = [f"{found[a, t] / found[b, t]:.2f}x" if {(a, t), (b, t)} <= found.keys() else "" for t in tokens]
        rows += [[title, *values]] if any(values) else []
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    main()
