"""Times every way to multiply 4-bit experts at 1 to 4096 rows per expert: does the layer choose the fastest?

The ways are those of the kernel's regime.py, gemv for as few slots as it takes. Each is forced and captured in a CUDA
graph, forward and with its gradients, from one token on; "chosen" is the layer left alone, and which way that goes is
noted. Graphs that are close are timed in turns, so that what disturbs the GPU disturbs all of them. Rows per expert are
averages, and --imbalance says how uneven the routing is.

Writes crossover.json as it goes, crossover.png at the end, both into --out, and fails if the chosen way is more than
3 % slower than another anywhere. It has been timed twice, forced and left alone, and the shorter time counts; once, if
backward goes another way than forward, for both are forced alike. A card's table gives up to 8 % of a direction's time
with usual routing for as much with uneven routing (MARGIN of tune.py), so where one path replaces another it can fail.

    python benchmarks/crossover.py --kernel . --out benchmarks/results/h200
"""

from __future__ import annotations

import argparse
import importlib
import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Callable

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from harness import four_bit
from harness.contest import attempt
from harness.environment import environment, kernel_identity
from harness.files import write_whole
from harness.measure import Call, capture, time_in_turns
from harness.peers import load_kernel
from harness.problem import PASSES, Shape, make_inputs, make_weights, run_pass

WAYS = ("fast", "plain", "dequantize", "gemv")
CHOSEN = "chosen"
ROOM = 1.03
FAR = 2
"""Ways that take so many times as long as the fastest are timed once: in turns with others they would do nothing but
let the device cool for whichever comes next."""
ROWS = sorted([*(2**i for i in range(13)), 640, 768, 896])  # more where tuned cards change over


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
        "complete": False,
        "slower": [],
        "times": [],
    }
    for tokens in sorted({1, *(max(1, rows * options.shape.experts // options.shape.top_k) for rows in options.rows)}):
        inputs = make_inputs(options.shape, tokens, torch.bfloat16, options.device, tokens, options.imbalance)
        for which in PASSES[:2]:
            call = partial(run_pass, layer, which, inputs, weights)
            times, way = time_ways(kernel, call, options), choice(kernel, call)
            record = {"tokens": tokens, "rows": tokens * options.shape.top_k / options.shape.experts, "pass": which}
            results["times"].append({**record, "chosen": way, "ms": times})
            results["slower"] = slower(results["times"])
            save(results, options.out)
            shown = ", ".join(f"{way} {time['median']:.3f}" for way, time in times.items() if time)
            print(f"{tokens} tokens, {which}, ms: {shown}", flush=True)
    results["complete"] = True
    save(results, options.out)
    draw(results, options.out / "crossover.png")
    for record in results["slower"]:
        print(f"slower than {record['fastest']} by {record['ratio']:.3f}: {record['pass']}, {record['tokens']} tokens")
    return 1 if results["slower"] else 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", type=Path, help="a local build (the folder that holds build/) instead of the Hub's")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS, help="rows per expert")
    parser.add_argument(
        "--imbalance", type=float, default=0.5, help="of routing; at 4, 16 of 128 experts get nearly all"
    )
    parser.add_argument("--shape", nargs=4, type=int, metavar=("H", "I", "E", "k"), default=(2048, 768, 128, 8))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget-ms", type=float, default=150.0, help="time spent on one way")
    parser.add_argument("--rounds", type=int, default=5, help="turns in which the ways share that time")
    options = parser.parse_args(argv)
    options.shape = Shape(*options.shape)
    return options


def time_ways(kernel: ModuleType, call: Call, options: argparse.Namespace) -> dict[str, dict | None]:
    """Milliseconds of a call whose weights go each way, and the chosen one; None where they cannot."""
    pool = torch.cuda.graph_pool_handle() if options.device == "cuda" else None
    ready = {way: prepared(kernel, way, call, pool, options.device) for way in (*WAYS, CHOSEN)}
    possible = {way: run for way, run in ready.items() if run}
    times = time_in_turns(possible, 1, options.budget_ms / options.rounds, options.device)
    least = min((time["median"] for time in times.values()), default=0)
    close = {way: run for way, run in possible.items() if times[way]["median"] <= FAR * least}
    times |= time_in_turns(close, options.rounds, options.budget_ms, options.device)
    return {way: times.get(way) for way in ready}


def prepared(kernel: ModuleType, way: str, call: Call, pool: tuple[int, int] | None, device: str) -> Call | None:
    """Runs ``call`` with its weights going ``way``, on a GPU as a graph in ``pool``; None if they cannot."""

    def on_this_way() -> None:
        with forced(kernel, way):
            call()

    if device == "cuda":
        graph, _ = attempt(partial(capture, [on_this_way], pool), device)
        return graph and graph.replay
    _, reason = attempt(on_this_way, device)
    return None if reason else on_this_way


@contextmanager
def forced(kernel: ModuleType, way: str) -> Iterator[None]:
    """The layer's weights go ``way`` meanwhile, unless that is the chosen one."""

    def too_many(*_) -> str:
        raise ValueError("only few slots, without gradients, are multiplied one by one")

    with replaced(kernel, {CHOSEN: None, "gemv": too_many}.get(way, lambda *_: way), gemv=way in (CHOSEN, "gemv")):
        yield


def choice(kernel: ModuleType, call: Call) -> str:
    """The way that a call's weights go by themselves, or the ways of forward and of backward where these differ; a
    layer that asks for none multiplies slot by slot."""
    choose, found = importlib.import_module(f"{kernel.__name__}.regime").regime, []

    def noted(*arguments) -> str:
        found.append(choose(*arguments))
        return found[-1]

    with replaced(kernel, noted, gemv=True):
        call()
    return " + ".join(dict.fromkeys(found)) if found else "gemv"


@contextmanager
def replaced(kernel: ModuleType, choose: Callable[..., str] | None, gemv: bool) -> Iterator[None]:
    """The layer chooses by ``choose`` meanwhile, unless it is None, after gemv if that is allowed."""
    regime, form = (importlib.import_module(f"{kernel.__name__}.{name}") for name in ("regime", "form"))
    own, slots = regime.regime, regime.GEMV_SLOTS
    regime.regime, regime.GEMV_SLOTS = choose or own, slots if gemv else 0
    form.forget()
    try:
        yield
    finally:
        regime.regime, regime.GEMV_SLOTS = own, slots
        form.forget()


def save(results: dict, folder: Path) -> None:
    write_whole(folder / "crossover.json", json.dumps(results, indent=1) + "\n")


def slower(records: list[dict]) -> list[dict]:
    """Where another way is faster than the chosen one by more than there is room for."""
    found = []
    for record in records:
        times = {way: time["median"] for way, time in record["ms"].items() if time}
        own = [times.pop(way) for way in (CHOSEN, record["chosen"]) if way in times]
        fastest = min(times, key=times.get, default=None)
        if own and fastest and min(own) > ROOM * times[fastest]:
            place = {key: record[key] for key in ("tokens", "rows", "pass")}
            found.append({**place, "fastest": fastest, "ratio": min(own) / times[fastest]})
    return found


def draw(results: dict, path: Path) -> None:
    """Milliseconds by rows per expert, both logarithmic, a panel each for forward and with gradients."""
    canvas, panels = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axes, which in zip(panels, PASSES):
        records = [record for record in results["times"] if record["pass"] == which]
        for way in (*WAYS, CHOSEN):
            timed = [(record["rows"], record["ms"][way]["median"]) for record in records if record["ms"][way]]
            style = {"color": "black", "linestyle": "--"} if way == CHOSEN else {"marker": "o"}
            if timed:
                axes.loglog(*zip(*timed), label=way, **style)
        axes.set(title=which, xlabel="rows per expert", ylabel="ms in a CUDA graph")
        axes.grid(alpha=0.3)
    panels[0].legend()
    canvas.suptitle(results["environment"]["device"])
    canvas.savefig(path, dpi=150)
    plt.close(canvas)


if __name__ == "__main__":
    sys.exit(main())
