"""One pass at one number of tokens, by every peer: checked first, then timed in turns, then in a CUDA graph."""

from __future__ import annotations

import argparse
import gc
import math
from collections.abc import Sequence
from functools import partial
from typing import Callable, TypeVar

import torch

from .measure import (
    Call,
    free_memory,
    peak_memory,
    poison_free_memory,
    repeats,
    summary,
    time_calls,
    time_graph,
    wall_time,
)
from .peers import Peer
from .problem import TOLERANCE, Inputs, Weights, reference, relative_error, run_pass, train_weights

T = TypeVar("T")


class DeviceLostError(RuntimeError):
    """The GPU answers no more: nothing measured after this would mean anything."""


def attempt(call: Callable[[], T], device: str) -> tuple[T | None, str | None]:
    """The call's result, or in one line why it has none: whatever a peer raises is a finding, not the end."""
    try:
        return call(), None
    except torch.OutOfMemoryError:
        reason = "out of memory"
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    if device == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise DeviceLostError(reason) from error
    return None, reason


class Contest:
    """The input sets and right answers for one number of tokens; :meth:`run` holds one pass over them."""

    def __init__(self, peers: Sequence[Peer], weights: Weights, sets: Sequence[Inputs], options: argparse.Namespace):
        self.peers, self.weights, self.sets, self.options = peers, weights, sets, options
        self.tokens = sets[0].hidden_states.shape[0]
        self.wanted = reference(sets[0], weights, weight_grads="trained" in options.passes)

    def run(self, which: str) -> list[dict]:
        """A record for each peer; those that could not run or are wrong say why and have no times."""
        gc.collect()
        train_weights(self.weights, which == "trained")
        calls = {peer.name: self._calls(peer, which) for peer in self.peers}
        records = [
            {"tokens": self.tokens, "pass": which, "peer": peer.name, **self._check(peer, which, calls[peer.name])}
            for peer in self.peers
        ]
        running = [record for record in records if record["status"] == "ok"]
        self._time_in_turns(running, calls)
        if self.options.device == "cuda":
            for record in running:
                peer = next(peer for peer in self.peers if peer.name == record["peer"])
                record["graph_ms"], record["graph_reason"] = self._time_graph(peer, calls[peer.name])
        return records

    def _calls(self, peer: Peer, which: str) -> list[Call]:
        return [partial(run_pass, peer.layer, which, inputs, self.weights) for inputs in self.sets]

    def _check(self, peer: Peer, which: str, calls: Sequence[Call]) -> dict:
        """Compares the first input set's results with the reference, then takes memory and a first idea of the time."""
        device = self.options.device
        if not has_room(peer, which, self.tokens, device):
            needed = peer.workspace(which, self.tokens) / 2**30
            return {"status": "skipped", "reason": f"it needs about {needed:.0f} GiB, more than half of what is free"}
        errors, reason = attempt(lambda: self._errors(calls[0]), device)
        if reason:
            return {"status": "failed", "reason": reason}
        tolerance = TOLERANCE[self.options.dtype]
        record = {"status": "ok", "errors": {name: finite(error) for name, error in errors.items()}}
        if not all(error <= tolerance for error in errors.values()):  # written so that NaN is wrong
            return {**record, "status": "wrong", "reason": f"a relative error above {tolerance} or NaN"}
        measured, reason = attempt(
            lambda: {"peak_bytes": peak_memory(calls[0], device), "wall_ms": 1e3 * wall_time(calls[0], device)}, device
        )
        return {**record, **measured} if measured else {**record, "status": "failed", "reason": reason}

    def _errors(self, call: Call) -> dict[str, float]:
        poison_free_memory(self.wanted.values(), self.options.dtype)
        return {name: relative_error(result, self.wanted[name]) for name, result in call().items()}

    def _time_in_turns(self, records: Sequence[dict], calls: dict[str, Sequence[Call]]) -> None:
        """Several rounds, in each of which every peer has a turn, so that all see the same clocks and temperatures."""
        options = self.options
        samples = {record["peer"]: [] for record in records}
        for turn in range(options.rounds):
            for i in range(len(records)):
                record = records[(i + turn) % len(records)]
                if record["status"] == "ok":
                    count = repeats(options.budget_ms / options.rounds, record["wall_ms"])
                    times, reason = attempt(
                        partial(time_calls, calls[record["peer"]], count, options.device), options.device
                    )
                    if reason:
                        record |= {"status": "failed", "reason": reason}
                    else:
                        samples[record["peer"]].append(times)
        for record in records:
            del record["wall_ms"]
            if record["status"] == "ok":
                record["call_ms"] = summary(samples[record["peer"]])

    def _time_graph(self, peer: Peer, calls: Sequence[Call]) -> tuple[dict | None, str | None]:
        if peer.host_waits:
            return None, peer.host_waits
        samples, reason = attempt(partial(time_graph, calls, self.options.budget_ms), self.options.device)
        return (summary([samples]), None) if samples else (None, reason)


def has_room(peer: Peer, which: str, tokens: int, device: str) -> bool:
    """Whether a peer that copies weights can do so in half of the free memory, and not crowd out all others."""
    return peer.workspace(which, tokens) <= 0.5 * free_memory(device)


def finite(number: float) -> float | None:
    """JSON has no NaN."""
    return number if math.isfinite(number) else None
