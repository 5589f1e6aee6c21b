"""Runs a function on several ranks: processes of their own, joined by gloo, on the CPU.

They are forked from a server that has imported the libraries and done nothing else: a rank starts at once, and with no
state that another test left. On GPUs they are spawned, and joined by NCCL.
"""

import contextlib
import gc
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing import connection, forkserver
from typing import Any, Optional

import torch
from torch import distributed

LIBRARIES = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "kernels",
    "matplotlib.pyplot",
    "peft",
    "torch.distributed.fsdp",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "transformers.trainer",
    "trl.trainer.sft_trainer",
)
SERVER = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
"""What every rank, and the server, has in its environment: one thread, no GPU, no network, and for TRL's loss Triton's
interpreter."""
SECONDS = 60
_CONTEXT = multiprocessing.get_context("forkserver")


def start_server() -> None:
    """If there is none yet: one is enough for all tests of a process."""
    _CONTEXT.set_forkserver_preload([*LIBRARIES])
    with _environment(**SERVER):
        forkserver.ensure_running()


def settle_in() -> None:
    """What a fork of the server does first."""
    gc.freeze()  # the libraries' objects are many and stay: a collection need not walk, and thereby copy, them
    torch.set_num_threads(1)
    if os.environ.get("TRITON_INTERPRET") == "1":
        from tests import interpreter

        interpreter.hasten()


def run_on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, seed: int = 0) -> list[Any]:
    """What ``function(*arguments)`` returns on each rank, all of which begin with the same random numbers.

    Raises:
        AssertionError: a rank raised an exception or died, or they took too long; the message has every traceback.
    """
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{port.getsockname()[1]}"
    pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(world_size)]
    processes = [
        _CONTEXT.Process(target=_rank, args=(ours, rank, world_size, address, seed, function, arguments), daemon=True)
        for rank, (_, ours) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    for _, ours in pipes:
        ours.close()
    try:
        return _collect([theirs for theirs, _ in pipes])
    finally:
        for process in processes:
            process.kill()
            process.join()


def run_on_gpus(world_size: int, function: Callable, *arguments: Any, seed: int, address: str) -> None:
    """``function(*arguments, device="cuda")`` on as many GPUs, whose ranks meet at ``address``.

    Raises:
        ProcessRaisedException, ProcessExitedException: a rank raised an exception or died.
    """
    torch.multiprocessing.spawn(_gpu_rank, (world_size, address, seed, function, *arguments), nprocs=world_size)


def _gpu_rank(rank: int, world_size: int, address: str, seed: int, function: Callable, *arguments: Any) -> None:
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    distributed.init_process_group("nccl", init_method=address, rank=rank, world_size=world_size, device_id=device)
    torch.manual_seed(seed)
    function(*arguments, device="cuda")
    gc.collect()  # a communicator outlives the graphs that use it
    distributed.destroy_process_group()


def _collect(pipes: list[connection.Connection]) -> list[Any]:
    """The ranks' results. The first that fails ends the wait: the others may be waiting for it."""
    results: dict[int, Any] = {}
    failures: list[str] = []
    waiting = dict(zip(pipes, range(len(pipes)), strict=True))
    while waiting and not failures:
        ready = connection.wait(list(waiting), timeout=SECONDS)
        if not ready:
            failures += [f"rank {rank} took more than {SECONDS} seconds" for rank in waiting.values()]
        for pipe in ready:
            rank = waiting.pop(pipe)
            try:
                results[rank], failure = pipe.recv()
            except EOFError:
                failure = "died"
            failures += [f"rank {rank}: {failure}"] if failure else []
    assert not failures, "\n".join(failures)
    return [results[rank] for rank in range(len(pipes))]


def _rank(
    pipe: connection.Connection, rank: int, world_size: int, address: str, seed: int, function: Callable, arguments
) -> None:
    result, failure = None, None
    settle_in()
    try:
        if world_size > 1:
            _join(rank, world_size, address)
        torch.manual_seed(seed)
        result = function(*arguments)
    except BaseException:
        failure = traceback.format_exc()
    sys.stdout.flush()
    pipe.send((result, failure))
    if failure is None and distributed.is_initialized():
        distributed.barrier()  # another rank may still be setting up a group with this one
        distributed.destroy_process_group()


def _join(rank: int, world_size: int, address: str) -> None:
    """As a launcher sets up a process; one on its own has no launcher."""
    host, port = address.split(":")
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
    }
    distributed.init_process_group("gloo", timeout=timedelta(seconds=SECONDS))


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before: dict[str, Optional[str]] = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    yield
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
