"""Times every way to multiply 4-bit experts at 1 to 4096 rows an expert: does the layer choose the fastest?

The ways are those of the kernel's regime.py. Each is forced in turn and timed in a CUDA graph, forward and with its
gradients, from one token on; "chosen" is the layer left alone. Writes crossover.json and crossover.png into --out and
fails if the chosen way is more than 3 % slower than the fastest anywhere.

    python benchmarks/crossover.py --kernel . --out benchmarks/results/h200
"""

from __future__ import annotations

import argparse
import importlib
import json
import shlex
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import ModuleType

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from harness import four_bit
from harness.contest import attempt
from harness.environment import environment, kernel_identity
from harness.measure import repeats, summary, time_calls, time_graph, wall_time
from harness.peers import load_kernel
from harness.problem import PASSES, Shape, make_inputs, make_weights, run_pass

WAYS = ("fast", "plain", "dequantize")
CHOSEN = "chosen"
ROOM = 1.03
ROWS = [2**i for i in range(13)]


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    kernel = load_kernel(options.kernel)
    packed, weights = four_bit.pack(make_weights(options.shape, torch.bfloat16, options.device))
    layer = four_bit.ours(kernel, packed).layer
    results = {
        "command": shlex.join(["python", "benchmarks/crossover.py", *argv]),
        "environment": environment(options.device),
        "kernel": kernel_identity(kernel),
        "shape": asdict(options.shape),
        "times": [],
    }
    for tokens in sorted({1, *(max(1, rows * options.shape.experts // options.shape.top_k) for rows in options.rows)}):
        inputs = make_inputs(options.shape, tokens, torch.bfloat16, options.device, seed=tokens)
        for which in PASSES[:2]:
            call = partial(run_pass, layer, which, inputs, weights)
            times = {way: time_way(kernel, way, call, options) for way in (*WAYS, CHOSEN)}
            record = {"tokens": tokens, "rows": tokens * options.shape.top_k / options.shape.experts, "pass": which}
            results["times"].append({**record, "ms": times})
            shown = ", ".join(f"{way} {time['median']:.3f}" for way, time in times.items() if time)
            print(f"{tokens} tokens, {which}, ms: {shown}", flush=True)
    results["slower"] = slower(results["times"])
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "crossover.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(results, options.out / "crossover.png")
    for record in results["slower"]:
        print(f"slower than {record['fastest']} by {record['ratio']:.3f}: {record['pass']}, {record['tokens']} tokens")
    return 1 if results["slower"] else 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", type=Path, help="a local build (the folder that holds build/) instead of the Hub's")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS, help="rows an expert")
    parser.add_argument("--shape", nargs=4, type=int, metavar=("H", "I", "E", "k"), default=(2048, 768, 128, 8))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget-ms", type=float, default=150.0, help="time spent on one way")
    options = parser.parse_args(argv)
    options.shape = Shape(*options.shape)
    return options


def time_way(kernel: ModuleType, way: str, call, options: argparse.Namespace) -> dict | None:
    """Milliseconds of a call whose weights go ``way``; None if they cannot."""
    regime = importlib.import_module(f"{kernel.__name__}.regime")
    choose, slots = regime.regime, regime.GEMV_SLOTS
    if way != CHOSEN:
        regime.regime, regime.GEMV_SLOTS = lambda *_: way, 0
    samples, _ = attempt(partial(sample, call, options), options.device)
    regime.regime, regime.GEMV_SLOTS = choose, slots
    return samples and summary([samples])


def sample(call, options: argparse.Namespace) -> list[float]:
    if options.device == "cuda":
        return time_graph([call], options.budget_ms)
    return time_calls([call], repeats(options.budget_ms, 1e3 * wall_time(call, "cpu")), "cpu")


def slower(records: list[dict]) -> list[dict]:
    """Where the chosen way takes more than it has room for."""
    found = []
    for record in records:
        times = {way: time["median"] for way, time in record["ms"].items() if time}
        fastest = min((way for way in times if way != CHOSEN), key=times.get, default=None)
        if fastest and CHOSEN in times and times[CHOSEN] > ROOM * times[fastest]:
            place = {key: record[key] for key in ("tokens", "rows", "pass")}
            found.append({**place, "fastest": fastest, "ratio": times[CHOSEN] / times[fastest]})
    return found


def draw(results: dict, path: Path) -> None:
    """Milliseconds by rows an expert, both logarithmic, a panel each for forward and with gradients."""
    canvas, panels = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axes, which in zip(panels, PASSES):
        records = [record for record in results["times"] if record["pass"] == which]
        for way in (*WAYS, CHOSEN):
            timed = [(record["rows"], record["ms"][way]["median"]) for record in records if record["ms"][way]]
            style = {"color": "black", "linestyle": "--"} if way == CHOSEN else {"marker": "o"}
            if timed:
                axes.loglog(*zip(*timed), label=way, **style)
        axes.set(title=which, xlabel="rows an expert", ylabel="ms in a CUDA graph")
        axes.grid(alpha=0.3)
    panels[0].legend()
    canvas.suptitle(results["environment"]["device"])
    canvas.savefig(path, dpi=150)
    plt.close(canvas)


if __name__ == "__main__":
    sys.exit(main())
