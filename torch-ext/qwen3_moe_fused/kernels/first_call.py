"""The first call of a kind: its kernels are compiled all at once.

Triton compiles a kernel when it is launched for the first time. One after the other, the kernels of a training step
take three times as long as the slowest alone, though none waits for another and nearly all of a compilation runs
outside Python's lock. So a call that finds a kernel missing is given up and rehearsed: its code runs once more, with
launches that start a compilation in a thread and nothing else, on memory that nobody fills. Which kernels a call
launches never depends on what tensors hold, so the call, made again, finds them all. It also finds what passes a
kernel's arguments on to the driver: a piece of C, for which Triton calls the C compiler.

A call that finds them at once pays 0.2 us for this.
"""

import contextlib
import contextvars
import functools
import threading
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Callable, Dict, Iterator, Optional, Tuple

import torch
import triton
from triton.runtime import driver

rehearsing = False
"""Whether some thread is rehearsing: then the launches of all threads ask :func:`intercepts`."""

_one_at_a_time = threading.Lock()


class _Thread(threading.local):
    """What a thread's launches do if their kernel is not compiled: unless they are told otherwise, compile it."""

    trying = False  # they raise NotCompiled
    rehearsing = False  # they start its compilation, and no launch happens
    postponing = False  # nor does a compilation


_thread = _Thread()


class NotCompiled(Exception):
    """Ends a call that will be rehearsed."""


def compiled_at_once(rehearsal: Optional[Callable] = None) -> Callable[[Callable], Callable]:
    """Decorates a function that launches kernels and, called twice, does the same twice.

    ``rehearsal``, with the same arguments, calls all that is to be compiled together; by default only the function.
    """

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args):
            _thread.trying = True
            try:
                return function(*args)
            except NotCompiled:
                pass  # and all that the call had allocated is free again
            finally:
                _thread.trying = False
            contextvars.Context().run(_rehearse, rehearsal or call, args)  # Triton keeps the mode in the context
            return function(*args)

        return call

    return decorate


class _Compilers(ThreadPoolExecutor):
    """Threads of which each has a kernel ready to be launched when it has compiled it."""

    def submit(self, compile_kernel: Callable) -> Future:
        return super().submit(_compile_with_launcher, compile_kernel)


def _compile_with_launcher(compile_kernel: Callable) -> Any:
    kernel = compile_kernel()
    driver.active.launcher_cls(kernel.src, kernel.metadata)  # left in Triton's cache, where the first launch looks
    return kernel


def _rehearse(rehearsal: Callable, args: Tuple) -> None:
    """What fails here (a kernel that does not compile, memory that is too small, a Triton that is too old) is a
    warning: the call itself then compiles in turn, and fails where it must."""
    global rehearsing
    with _one_at_a_time:
        rehearsing = _thread.rehearsing = True
        try:
            with _Compilers() as pool, triton.AsyncCompileMode(pool):
                rehearsal(*args)
        except Exception as error:
            warnings.warn(f"Triton kernels are compiled one after the other: {error!r}", stacklevel=2)
        finally:
            rehearsing = _thread.rehearsing = False


@contextlib.contextmanager
def postponed() -> Iterator[None]:
    """In a rehearsal, what runs herein only allocates: its kernels are compiled when it runs again."""
    _thread.postponing = True
    try:
        yield
    finally:
        _thread.postponing = False


def intercepts(
    kernel: triton.JITFunction, grid: Tuple[int, ...], arguments: Tuple, options: Dict[str, Any], compiled: bool
) -> bool:
    """Whether a launch must not happen, because its thread is rehearsing.

    Raises:
        NotCompiled: the call can be rehearsed first. While a CUDA graph is captured it cannot: memory that is only
            touched would be the graph's, and so would copies.
    """
    if _thread.rehearsing:
        if not compiled and not _thread.postponing:
            kernel.warmup(*arguments, grid=grid, **options)
        return True
    if _thread.trying and not compiled and not torch.cuda.is_current_stream_capturing():
        raise NotCompiled
    return False
