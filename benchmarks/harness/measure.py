"""Clocks. On a GPU by CUDA events and CUDA graphs, on a CPU by the wall clock.

A *call* time is the time between the ends of two consecutive calls that are queued back to back: device work, and the
host's launches where those take longer. A *graph* time is device work alone: several calls captured in one CUDA graph
and replayed. Both go round a ring of input sets, each with its own routing, so that no call finds its experts in the
cache because the call before it left them there.

Backward runs in the thread that calls it. By default PyTorch hands it to a thread of its own, once in a whole model's
step; with a lone layer each call would wait for that thread to wake.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Callable

import torch

Call = Callable[[], object]
WARM_UP_CALLS = 2


def time_calls(calls: Sequence[Call], count: int, device: str) -> list[float]:
    """Milliseconds of each of ``count`` calls, taken in turn from ``calls``, after a short warm-up."""
    with torch.autograd.set_multithreading_enabled(False):
        for i in range(WARM_UP_CALLS):
            calls[-1 - i % len(calls)]()
        gc.disable()  # a collection would be counted as part of the call it falls into
        try:
            return _time_by_events(calls, count) if device == "cuda" else _time_by_wall(calls, count)
        finally:
            gc.enable()


def _time_by_events(calls: Sequence[Call], count: int) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for i in range(count):
        calls[i % len(calls)]()
        events[i + 1].record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in zip(events, events[1:])]


def _time_by_wall(calls: Sequence[Call], count: int) -> list[float]:
    marks = [time.perf_counter()]
    for i in range(count):
        calls[i % len(calls)]()
        marks.append(time.perf_counter())
    return [1e3 * (end - start) for start, end in zip(marks, marks[1:])]


def time_graph(calls: Sequence[Call], budget_ms: float) -> list[float]:
    """Milliseconds a call of each replay of one CUDA graph that holds every call of ``calls`` once."""
    graph = capture(calls)
    seconds = wall_time(graph.replay, "cuda")
    samples = time_calls([graph.replay], repeats(budget_ms, 1e3 * seconds), "cuda")
    return [sample / len(calls) for sample in samples]


def capture(calls: Sequence[Call], pool: tuple[int, int] | None = None) -> torch.cuda.CUDAGraph:
    """One CUDA graph that holds every call of ``calls`` once.

    Graphs that share a ``pool`` share their memory too: each may overwrite what another left.
    """
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # a capture has its own memory pool and cannot take over what others left cached
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:WARM_UP_CALLS]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        for call in calls:
            call()
    return graph


def time_in_turns(calls: Mapping[str, Call], rounds: int, budget_ms: float, device: str) -> dict[str, dict]:
    """A summary for each of ``calls``, ``budget_ms`` of each in ``rounds`` rounds, each begun by another.

    What slows the device for a while then slows all of them: their ratios are right where a time alone is not. Every
    other round goes backwards, for a call that follows one which left the device cool runs at higher clocks.
    """
    names, samples = list(calls), {name: [] for name in calls}
    counts = {name: repeats(budget_ms / rounds, 1e3 * wall_time(call, device)) for name, call in calls.items()}
    for turn in range(rounds):
        for i in range(len(names)):
            name = names[(turn - i if turn % 2 else turn + i) % len(names)]
            samples[name].append(time_calls([calls[name]], counts[name], device))
    return {name: summary(each) for name, each in samples.items()}


def wall_time(call: Call, device: str) -> float:
    """Seconds from before one call to its result."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def repeats(budget_ms: float, call_ms: float, most: int = 100) -> int:
    """How many calls fit in the budget: at least two, at most ``most``."""
    return int(max(2, min(most, budget_ms / max(call_ms, 1e-3))))


def peak_memory(call: Call, device: str) -> int | None:
    """Bytes allocated at the worst moment of a call beyond what was allocated before it; None on a CPU."""
    if device != "cuda":
        call()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def free_memory(device: str) -> float:
    """Bytes that PyTorch could still allocate; unlimited on a CPU, where the caller chose the sizes."""
    if device != "cuda":
        return float("inf")
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def poison_free_memory(like: Iterable[torch.Tensor], dtype: torch.dtype, copies: int = 4) -> None:
    """Leaves NaN where the next tensors of these sizes will be allocated.

    A result that someone forgets to write is then a NaN, not a right answer that an earlier call left there.
    """
    _ = [torch.full_like(tensor, float("nan"), dtype=dtype) for tensor in like for _ in range(copies)]


def summary(rounds: Sequence[Sequence[float]]) -> dict:
    """Median and spread of all samples, and each round's own median: noise is what those differ by."""
    samples = sorted(sample for samples in rounds for sample in samples)
    last = len(samples) - 1
    return {
        "median": statistics.median(samples),
        "min": samples[0],
        "p10": samples[round(0.1 * last)],
        "p90": samples[round(0.9 * last)],
        "rounds": [statistics.median(samples) for samples in rounds],
        "calls": len(samples),
    }
