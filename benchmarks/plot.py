"""Draws the JSON of compare.py: time, memory and the distance to every peer, by number of tokens. Needs no GPU.

    python benchmarks/plot.py benchmarks/results/h200/compare.json

writes compare-time.png, compare-memory.png and compare-ratio.png beside the file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Callable

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from harness.peers import OURS
from harness.problem import PASSES
from harness.report import value
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator

COLOURS = ["#d55e00", "#999999", "#cc79a7", "#0072b2", "#009e73", "#e69f00"]  # told apart by colour-blind eyes too
TITLES = {"forward": "forward", "frozen": "forward + backward, frozen", "trained": "forward + backward, trained"}
Draw = Callable[[Axes, str, dict], None]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, help="compare.json of a run")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    path = parse(argv).json
    results = json.loads(path.read_text())
    figure(results, path.with_name(f"{path.stem}-time.png"), "ms a call (dashed: in a CUDA graph)", draw_times)
    figure(results, path.with_name(f"{path.stem}-ratio.png"), "time of a call over ours", draw_ratios)
    if any(value(record, "peak_bytes") for record in results["layer"]):
        figure(results, path.with_name(f"{path.stem}-memory.png"), "peak memory of a call, MiB", draw_memory)


def figure(results: dict, path: Path, label: str, draw: Draw) -> None:
    """One panel a pass, each drawn by ``draw``, on logarithmic axes."""
    passes = [which for which in PASSES if any(record["pass"] == which for record in results["layer"])]
    canvas, panels = plt.subplots(1, len(passes), figsize=(5 * len(passes), 4.5), squeeze=False, sharey=True)
    canvas.set_layout_engine("constrained")
    for axes, which in zip(panels[0], passes):
        draw(axes, which, results)
        tokens = sorted({record["tokens"] for record in results["layer"]})
        axes.set(title=TITLES[which], xlabel="tokens", xscale="log", yscale="log")
        axes.set_xticks(tokens, [str(count) for count in tokens], fontsize=8)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel(label)
    lines = {line.get_label(): line for axes in panels[0] for line in axes.lines}
    named = {name: line for name, line in lines.items() if not name.startswith("_")}
    canvas.legend(named.values(), named, loc="outside lower center", ncols=len(named), fontsize=8)
    shape = results["shape"]
    canvas.suptitle(
        f"{results['environment']['device']}, {results['dtype']}, H {shape['hidden']}, I {shape['intermediate']}, "
        f"E {shape['experts']}, top-{shape['top_k']}",
        fontsize=10,
    )
    canvas.savefig(path, dpi=150)
    plt.close(canvas)


def draw_times(axes: Axes, which: str, results: dict) -> None:
    for name, colour in palette(results).items():
        line(axes, series(results, which, name, "call_ms"), name, colour)
        line(axes, series(results, which, name, "graph_ms"), None, colour, linestyle="--", marker="")
    floors = {int(key.split()[1]): floor for key, floor in results["floors_ms"].items() if key.split()[0] == which}
    line(axes, floors, "floor of this GPU", "black", linestyle=":", marker="")


def draw_ratios(axes: Axes, which: str, results: dict) -> None:
    own = series(results, which, OURS, "call_ms")
    for name, colour in palette(results).items():
        theirs = series(results, which, name, "call_ms")
        line(axes, {tokens: theirs[tokens] / own[tokens] for tokens in theirs if tokens in own}, name, colour)


def draw_memory(axes: Axes, which: str, results: dict) -> None:
    for name, colour in palette(results).items():
        sizes = series(results, which, name, "peak_bytes")
        line(axes, {tokens: size / 2**20 for tokens, size in sizes.items()}, name, colour)


def palette(results: dict) -> dict[str, str]:
    """A colour for each peer that was timed, ours first."""
    names = dict.fromkeys(record["peer"] for record in results["layer"] if "call_ms" in record)
    return dict(zip(sorted(names, key=lambda name: name != OURS), COLOURS))


def series(results: dict, which: str, peer: str, key: str) -> dict[int, float]:
    """Tokens -> measurement of one peer in one pass."""
    mine = (record for record in results["layer"] if record["pass"] == which and record["peer"] == peer)
    return {record["tokens"]: value(record, key) for record in mine if value(record, key)}


def line(axes: Axes, points: dict[int, float], label: str | None, colour: str, **style) -> None:
    if points:
        tokens = sorted(points)
        axes.plot(tokens, [points[count] for count in tokens], label=label, color=colour, **{"marker": "o", **style})


if __name__ == "__main__":
    main()
