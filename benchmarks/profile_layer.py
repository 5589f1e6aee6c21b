"""Where the time of one forward and backward goes, kernel by kernel, as PyTorch's profiler sees it.

    python benchmarks/profile_layer.py --kernel . --out benchmarks/results/h200 --tokens 4096 --passes frozen

prints a table for each pass and number of tokens and writes profile.md and profile.json into --out.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys

from harness.environment import environment
from harness.files import write_whole
from harness.options import parse
from harness.peers import load_kernel, loaders
from harness.problem import Layer, Weights, make_inputs, make_weights, run_pass, train_weights
from torch.profiler import ProfilerActivity, profile

CALLS = 10


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv, __doc__)
    weights = make_weights(options.shape, options.dtype, options.device)
    peers = loaders(lambda: load_kernel(options.kernel), options.shape, weights)
    profiles = []
    for name in options.peers if "--peers" in argv else ["ours"]:
        peer = peers[name]()
        for tokens in options.tokens:
            for which in options.passes:
                train_weights(weights, which == "trained")
                rows = profile_pass(peer.layer, which, tokens, weights, options)
                profiles.append({"peer": peer.name, "tokens": tokens, "pass": which, "device_ops": rows})
    text = "\n\n".join(table(entry) for entry in profiles) + "\n"
    command = shlex.join(["python", "benchmarks/profile_layer.py", *argv])
    result = {"command": command, "environment": environment(options.device), "profiles": profiles}
    write_whole(options.out / "profile.json", json.dumps(result, indent=1) + "\n")
    write_whole(options.out / "profile.md", f"`{command}`\n\n{text}")
    print(text)


def profile_pass(layer: Layer, which: str, tokens: int, weights: Weights, options: argparse.Namespace) -> list[dict]:
    """Name, launches a call and microseconds a call of everything that ran on the device, longest first."""
    inputs = make_inputs(options.shape, tokens, options.dtype, options.device, seed=1)
    run_pass(layer, which, inputs, weights)
    on_gpu = options.device == "cuda"
    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with profile(activities=activities) as recorded:
        for _ in range(CALLS):
            run_pass(layer, which, inputs, weights)
    events = recorded.key_averages()
    times = {event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total for event in events}
    counts = {event.key: event.count for event in events}
    longest = sorted((name for name in times if times[name] > 0), key=times.get, reverse=True)
    return [{"name": name, "launches": counts[name] / CALLS, "us": times[name] / CALLS} for name in longest]


def table(entry: dict) -> str:
    rows = entry["device_ops"]
    total = sum(row["us"] for row in rows)
    lines = [f"## {entry['peer']}, {entry['pass']}, {entry['tokens']} tokens: {total:.0f} us", ""]
    lines += ["| launches | us | share | what |", "| ---: | ---: | ---: | --- |"]
    lines += [f"| {r['launches']:g} | {r['us']:.1f} | {r['us'] / total:.0%} | {r['name'][:90]} |" for r in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
