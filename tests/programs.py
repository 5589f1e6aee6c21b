"""Scripts as a user runs them, each in a process of its own, most of them without the wait for their imports.

A script is a fork of the server of ``ranks.py``, which has imported the libraries: that takes longer than most scripts
do. It is the ``__main__`` of that process, with a command line, an environment, a path, outputs and an exit code of its
own. What libraries read of the environment while they are imported is the server's, so a script is a new Python where
they would read something else, where there is a GPU, which the server has been told there is not, and where a test
asks for one.
"""

import json
import multiprocessing
import os
import resource
import runpy
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Optional

import torch

from tests.integration.distributed.ranks import SERVER, settle_in, start_server

OFFLINE = {"HF_HUB_OFFLINE": "1"}
"""No script of a test needs the Hub."""
READ_BY_IMPORTS = ("CUDA_", "DATASETS_", "HF_", "OMP_", "PYTORCH_", "TORCH", "TRANSFORMERS_")
"""How their names begin. The server has one thread, as tests have by ``make``. Not Triton's: it reads whether to
interpret when a kernel is defined, and of the libraries' kernels, which the server defines, none runs on a CPU
otherwise."""


def start(
    script: Path,
    *arguments: Any,
    variables: Optional[Mapping[str, str]] = None,
    most: Optional[int] = None,
    fresh: bool = False,
) -> "subprocess.Popen[str] | Fork":
    """Starts a script, with these variables beside those of the tests; its files may grow to ``most`` bytes."""
    command, environment = [str(script), *map(str, arguments)], os.environ | OFFLINE | (variables or {})
    if not fresh and _same_imports(environment):
        return Fork(command, environment, most)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    limit = None if most is None else (lambda: _limit(most))
    return subprocess.Popen([sys.executable, *command], env=environment, preexec_fn=limit, **pipes)


def run(script: Path, *arguments: Any, seconds: float = 600, **settings: Any) -> subprocess.CompletedProcess:
    """Runs a script to its end; kills it, and raises ``subprocess.TimeoutExpired``, if it takes longer."""
    with start(script, *arguments, **settings) as process:
        try:
            printed, said = process.communicate(timeout=seconds)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess([script, *arguments], process.returncode, printed, said)


class Fork:
    """A script in a fork of the server, with as much of ``subprocess.Popen`` as tests use."""

    def __init__(self, command: list[str], environment: dict[str, str], most: Optional[int]):
        start_server()
        pipes = [multiprocessing.Pipe(duplex=False) for _ in range(2)]
        theirs = [end for _, end in pipes]
        self._process = multiprocessing.get_context("forkserver").Process(
            target=_main, args=(command, environment, _path(environment), os.getcwd(), most, theirs)
        )
        self._process.start()
        self._printed = ["", ""]
        self._readers = [threading.Thread(target=self._read, args=(i, pipes[i][0]), daemon=True) for i in range(2)]
        for end, reader in zip(theirs, self._readers, strict=True):
            end.close()
            reader.start()

    @property
    def returncode(self) -> Optional[int]:
        return self._process.exitcode

    def poll(self) -> Optional[int]:
        return self.returncode

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: Optional[float] = None) -> list[str]:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        for reader in self._readers:
            reader.join()
        return self._printed

    def __enter__(self) -> "Fork":
        return self

    def __exit__(self, *_) -> None:
        self._process.join()

    def _read(self, which: int, end: Connection) -> None:
        with open(os.dup(end.fileno()), errors="replace") as stream:
            end.close()
            self._printed[which] = stream.read()


def _same_imports(environment: dict[str, str]) -> bool:
    """Whether libraries would make the same of this environment as they have of the server's."""
    there = os.environ | SERVER
    here = environment | {"CUDA_VISIBLE_DEVICES": ""}  # there is none either way
    names = {name for name in {*there, *here} if name.startswith(READ_BY_IMPORTS)}
    return not torch.cuda.is_available() and all(there.get(name) == here.get(name) for name in names)


def _path(environment: dict[str, str]) -> list[str]:
    """Where a new Python looks for modules, beside the folder of its script."""
    program = "import json, sys; print(json.dumps(sys.path[1:]))"
    return json.loads(subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True).stdout)


def _limit(most: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def _main(
    command: list[str],
    environment: dict[str, str],
    path: Iterable[str],
    folder: str,
    most: Optional[int],
    outputs: list[Connection],
) -> None:
    for number, output in enumerate(outputs, 1):
        os.dup2(output.fileno(), number)
        output.close()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if most is not None:
        _limit(most)
    settle_in()
    sys.argv = command
    sys.path = [str(Path(command[0]).resolve().parent), *path]
    runpy.run_path(command[0], run_name="__main__")
