"""What the tests of behaviour at run time do with a call: capture it, measure its memory, forbid the host to wait."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

Results = TypeVar("Results")

MIB = 1 << 20
SLACK = 8 * MIB
"""Room for index tensors, partial sums and the allocator, which rounds each block up by as much as 1 MiB."""


def capture(function: Callable[[], Results]) -> tuple[torch.cuda.CUDAGraph, Results]:
    """``function`` as a CUDA graph, and the tensors that its replays fill."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


def copy_in(static: Iterable[torch.Tensor], fresh: Iterable[torch.Tensor]) -> None:
    for old, new in zip(static, fresh):
        old.copy_(new)


def memory(
    function: Callable[[], object],
    release: Callable[[], object] = lambda: None,
    before: Callable[[], object] = lambda: None,
) -> tuple[int, int]:
    """(kept, peak): bytes above the start that ``function`` leaves allocated, and the most it had at one time.

    The call that is measured is a replayed one, unless ``before`` it the kernel is made to forget."""
    for _ in range(3):  # compiles and loads, is recorded, is replayed
        function()
        release()
    before()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    result = function()
    kept = torch.cuda.memory_allocated() - start
    peak = torch.cuda.max_memory_allocated() - start
    del result
    return kept, peak


@contextmanager
def no_host_waits() -> Iterator[None]:
    """Whoever waits for the device herein raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
