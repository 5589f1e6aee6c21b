"""Times this kernel's experts layer against every installed peer, on the same inputs, in one run.

Each result is checked against an fp64 reference before it is timed; a peer that is missing, fails or is wrong is
reported and left out. Writes compare.json (everything, as it goes) and compare.md (tables) into --out; plot.py draws
the JSON. benchmarks/README.md says what is measured and how.

    python benchmarks/compare.py --kernel . --out benchmarks/results/h200
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from dataclasses import asdict
from functools import lru_cache, partial

from harness import four_bit
from harness.cold_start import cold_start
from harness.contest import Contest, DeviceLostError, attempt, has_room
from harness.environment import ceilings, environment, kernel_identity
from harness.files import write_whole
from harness.measure import wall_time
from harness.options import parse
from harness.peers import Peer, load_kernel, loaders
from harness.problem import Inputs, Weights, make_inputs, make_weights, run_pass, train_weights
from harness.report import report
from harness.routing import routing_records


class Run:
    """The results of a run, on disk at every moment as far as they go."""

    def __init__(self, options: argparse.Namespace, argv: list[str]):
        self.options, self.start = options, time.perf_counter()
        self.results = {
            "command": shlex.join(["python", "benchmarks/compare.py", *argv]),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "complete": False,
            "aborted": "it was interrupted",
            "environment": environment(options.device),
            "kernel": None,
            "dtype": str(options.dtype).split(".")[1],
            "shape": asdict(options.shape),
            "settings": {name: getattr(options, name) for name in ("input_sets", "rounds", "budget_ms")},
            "ceilings": None,
            "cold_start": None,
            "peers": [],
            "floors_ms": {},
            "routing": [],
            "layer": [],
        }

    def save(self) -> None:
        stem = "compare-four-bit" if self.options.four_bit else "compare"
        write_whole(self.options.out / f"{stem}.json", json.dumps(self.results, indent=1))
        write_whole(self.options.out / f"{stem}.md", report(self.results))

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.start:6.1f} s] {text}", flush=True)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv, __doc__)
    run = Run(options, argv)
    try:
        compare(run, argv)
        run.results["complete"] = True
        del run.results["aborted"]
    except DeviceLostError as error:
        run.results["aborted"] = f"the GPU was lost: {error}"
    finally:
        run.save()
    print(report(run.results))
    return 0 if run.results["complete"] else 1


def compare(run: Run, argv: list[str]) -> None:
    options, results = run.options, run.results
    if options.cold_start and "ours" in options.peers:
        timed, reason = attempt(partial(cold_start, argv), "cpu")
        results["cold_start"] = timed or {"reason": reason}
        run.say("cold start timed")
    results["ceilings"] = ceilings(options.dtype, options.device)
    weights = make_weights(options.shape, options.dtype, options.device)
    kernel = lru_cache(partial(load_kernel, options.kernel))
    if options.four_bit:
        packed, weights = four_bit.pack(weights)
        load = four_bit.loaders(kernel, options.shape, packed)
    else:
        load = loaders(kernel, options.shape, weights)
    peers = load_peers(run, load, weights)
    run.save()
    for tokens in options.tokens:
        sets = [input_set(options, tokens, seed) for seed in range(1, options.input_sets + 1)]
        add_floors(run, sets)
        if "ours" in options.peers:
            results["kernel"] = kernel_identity(kernel())
            results["routing"] += routing_records(kernel(), sets, options)
        contest = Contest(peers, weights, sets, options)
        for which in options.passes:
            records = contest.run(which)
            results["layer"] += records
            run.save()
            times = (f"{r['peer']} {r['call_ms']['median']:.3f}" for r in records if "call_ms" in r)
            run.say(f"{tokens} tokens, {which}, ms: {', '.join(times)}")


def load_peers(run: Run, loaders: dict, weights: Weights) -> list[Peer]:
    """The peers that can be imported, each compiled and tuned at one large size before anything is timed.

    An autotuner that looks only at the layer's shape keeps what it finds here for every number of tokens.
    """
    options, usable = run.options, []
    inputs = input_set(options, options.settle_tokens, seed=0)
    for name in options.peers:
        peer, reason = attempt(loaders[name], options.device)
        if peer is None:
            run.results["peers"].append({"name": name, "reason": reason})
            continue
        record = {"name": peer.name, "version": peer.version, "always_weight_grads": peer.always_weight_grads}
        settled, reason = attempt(partial(settle, peer, inputs, weights, options), options.device)
        run.results["peers"].append({**record, "first_calls_s": settled, "reason": reason})
        run.say(f"{peer.name}: {reason or 'ready'}")
        usable += [peer] if reason is None else []
    return usable


def settle(peer: Peer, inputs: Inputs, weights: Weights, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of the first call of each pass; none for a peer that has no room for so many tokens."""
    seconds = {}
    for which in options.passes:
        if has_room(peer, which, options.settle_tokens, options.device):
            train_weights(weights, which == "trained")
            seconds[which] = wall_time(partial(run_pass, peer.layer, which, inputs, weights), options.device)
    return seconds


def input_set(options: argparse.Namespace, tokens: int, seed: int) -> Inputs:
    return make_inputs(options.shape, tokens, options.dtype, options.device, seed)


def add_floors(run: Run, sets: list[Inputs]) -> None:
    """No version runs faster than the larger of its arithmetic and its memory traffic at this GPU's own ceilings."""
    limits, tokens = run.results["ceilings"], sets[0].hidden_states.shape[0]
    if limits:
        active = sum(inputs.top_k_index.unique().numel() for inputs in sets) / len(sets)
        for which in run.options.passes:
            weight_size = four_bit.WEIGHT_BYTES if run.options.four_bit else None
            operations, size = run.options.shape.cost(which, tokens, active, run.options.dtype.itemsize, weight_size)
            seconds = max(operations / limits["operations_per_second"], size / limits["bytes_per_second"])
            run.results["floors_ms"][f"{which} {tokens}"] = 1e3 * seconds


if __name__ == "__main__":
    sys.exit(main())
