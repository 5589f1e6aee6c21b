"""Markdown pages as programs: a page's code blocks, one after another, as they stand, in a process of their own.

A page runs in a copy of the repository, as a reader has it, where names that a reader would replace stand for files
that are there: a small model is ``Qwen/Qwen3-30B-A3B``, a text ``notes.jsonl``, and so on. A comment right before a
block says what it needs:

    <!-- needs: gpu -->     runs only where there is one
    <!-- needs: hub -->     runs against the tests' own Hub, in tests/hub
    <!-- needs: ranks -->   runs in two processes, as torchrun starts them
    <!-- needs: itself -->  runs in a process in which nothing has changed libraries before

Commands run in the page's process, as Python does. SHORTENED says what is appended to those that train, measure or
compile. What does not run as it stands:

- ``tune.py`` needs a GPU: without one, its parser reads the command.
- ``torchrun`` and ``accelerate launch`` start as many processes as the page says, but as forks of its own, on the CPU:
  they compute in fp32 and talk by gloo, and under FSDP pass for GPUs, for Accelerate wants some.
- ``pip install`` installs what is in the repository, into a folder, without what that needs. Another package is one
  that the project knows: no test downloads any.
- ``make`` says what it would run. Of that the project's own scripts run: not what sets up .venv, where tests run.
"""

import importlib
import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, NamedTuple
from unittest.mock import patch

import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from packaging.requirements import Requirement
from torch import distributed
from torch.distributed import run as torchrun
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tests.integration.distributed.launch import pass_for_gpus
from tests.integration.distributed.ranks import run_on_ranks, settle_in, start_server

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ROOT / "tests/packages"
"""Stand-ins for a package that needs a GPU, and for one that prints a table."""
OTHER_PACKAGES = {"liger-kernel", "grouped-nf4-gemm", "unsloth"}
"""What pages have a reader install, beside what the requirements pin."""
SMALL = "--hidden 256 --intermediate 128 --experts 8 --top-k 2 --rows 1"
SHORTENED = {
    "examples/finetune.py": "--steps 2 --save-every 1 --seq-len 32",
    "examples/finetune_unsloth.py": "--steps 2 --seq-len 32",
    "examples/generate.py": "--tokens 2",
    "benchmarks/compare.py": "--quick --tokens 1 16 --budget-ms 1 --no-cold-start",
    "benchmarks/compare_lora.py": "--quick --tokens 8 --rounds 1 --budget-ms 1",
    "benchmarks/profile_layer.py": "--quick --tokens 16",
    "benchmarks/crossover.py": "--shape 64 64 4 2 --rows 1 --budget-ms 1",
    "benchmarks/compile_report.py": f"{SMALL} --arch 86 --layers 'nf4 bf16' --workers 1",
    "benchmarks/scaling.py": "--tiny --layers 1 --tokens 24 --steps 3 --engines alone ddp experts",
    "benchmarks/train_step_unsloth.py": "--tiny --layers 1 --tokens 16 --steps 2",
    "kernels benchmark": "--iterations 1 --warmup 0 --output benchmark.json",
    "tune.py": SMALL,
}
"""What is appended to a command: a few steps, tokens or calls, and a tiny layer."""
CHECKOUT = ("benchmarks", "examples", "integration", "scripts", "torch-ext", "build.toml", "Makefile", "tune.py")
"""What of the repository pages run or read, beside the requirements."""

_FENCE = re.compile(r"(?:<!-- needs: (?P<needs>\w+) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)


class Block(NamedTuple):
    """``line`` is that of the first line of code; ``needs`` is one of the words above, or empty."""

    language: str
    line: int
    code: str
    needs: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(match["language"], text.count("\n", 0, match.start("code")) + 1, match["code"], match["needs"] or "")
        for match in _FENCE.finditer(text)
    ]


def run(page: Path, chosen: list[Block], folder: Path, check: Callable[[list[dict]], Any], environment: dict) -> None:
    """Runs blocks of a page in ``folder``, then ``check`` on the names that there were after each block of Python; an
    AssertionError if one fails."""
    in_own_process(_run_page, page, chosen, check, folder=folder, environment=environment)


def run_on_two_ranks(page: Path, chosen: list[Block], folder: Path, check: Callable, environment: dict) -> None:
    """The same in two processes at once, each of which checks its own names."""
    start_server()
    run_on_ranks(2, _in_folder, _run_page, (page, chosen, check), folder, environment)


def in_own_process(function: Callable, *arguments: Any, folder: Path, environment: dict[str, str]) -> None:
    """Calls a function of a module in a process that runs in ``folder``; an AssertionError if it raises.

    The process is a fork of one that has imported the libraries, since that takes longer than all pages. It is a new
    one where there is a GPU, for what a library has asked CUDA cannot be forked. Triton interprets what is defined
    while a variable says so: the libraries' kernels anyway, as the server has it, the page's as ``environment`` has it.
    """
    new = torch.cuda.is_available()
    if not new:
        start_server()  # there is one in a run of tests, whoever needs it first
    context = multiprocessing.get_context("spawn" if new else "forkserver")
    log = folder.with_suffix(".log")
    process = context.Process(target=_call, args=(function, arguments, folder, environment, log))
    with patch.dict(os.environ, environment):
        process.start()
    process.join(300)
    if process.is_alive():
        process.kill()
    assert process.exitcode == 0, f"{function.__name__}{arguments}:\n{log.read_text()[-6000:]}"


def _call(function: Callable, arguments: tuple, folder: Path, environment: dict[str, str], log: Path) -> None:
    with log.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    settle_in()
    os.environ.pop("TRITON_INTERPRET", None)  # the server's, not for what a page starts
    _in_folder(function, arguments, folder, environment)


def _in_folder(function: Callable, arguments: tuple, folder: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    sys.path.insert(0, str(ROOT / "integration"))
    sys.path.append(str(PACKAGES))  # last: where such a package is installed, that one is taken
    os.chdir(folder)
    function(*arguments)


def copy_checkout(folder: Path) -> None:
    """Puts what pages take for the repository into ``folder``, less what was made there."""
    for path in [ROOT / name for name in CHECKOUT] + [*ROOT.glob("requirements*.txt")]:
        if path.is_dir():
            made = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "outputs", "results")
            shutil.copytree(path, folder / path.name, ignore=made)
        else:
            shutil.copy(path, folder)


def call_main(script: Path, *arguments: Any) -> None:
    """Imports a script and calls its ``main``, as its command line would."""
    _import(script).main([*map(str, arguments)])


def _import(script: Path) -> ModuleType:
    sys.path.insert(0, str(script.resolve().parent))
    return importlib.import_module(script.stem)


def _run_page(page: Path, chosen: list[Block], check: Callable[[list[dict]], Any]) -> None:
    names, after = {"__name__": "__main__"}, []
    for block in chosen:
        if block.language == "bash":
            run_commands(block.code)
        elif block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.code, page, "exec"), names)
            after.append(names.copy())
    check(after)


def run_commands(text: str) -> None:
    """Runs them one after another; an AssertionError names the line that is wrong."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            try:
                _run_command(words)
            except (Exception, SystemExit) as error:
                raise AssertionError(f"{line}: {error!r}") from error


def _run_command(words: list[str]) -> None:
    if words[:3] == ["python", "-m", "qwen3_moe_integration"]:
        from qwen3_moe_integration.__main__ import main

        assert main(words[3:]) == 0
    elif words[:2] == ["python", "tune.py"] and not torch.cuda.is_available():
        _import(Path("tune.py")).parse(words[2:])
    elif words[0] == "python":
        call_main(Path(words[1]), *_shortened(words[1], words[2:]))
    elif words[0] == "torchrun":
        with _launched_here():
            torchrun.main(words[1:])
    elif words[:2] == ["accelerate", "launch"]:
        with _launched_here():
            launch_command(launch_command_parser().parse_args(["--mixed_precision=no", *words[2:]]))
    elif words[:2] == ["kernels", "benchmark"]:
        from kernels.cli import main

        with patch.object(sys, "argv", ["kernels", "benchmark", *_shortened("kernels benchmark", words[2:])]):
            main()
    elif words[0] == "make":
        _make(words[1:])
    elif words[:2] == ["pip", "install"]:
        _install(words[2:])
    else:
        raise AssertionError("a command that this test does not know")


def _shortened(command: str, arguments: list[str]) -> list[str]:
    return [*arguments, *shlex.split(SHORTENED.get(command, ""))]


@contextmanager
def _launched_here() -> Iterator[None]:
    """Launchers fork this process, since theirs would import all libraries first, and log into this folder."""

    def launch(config: LaunchConfig, entrypoint: str) -> elastic_launch:
        config.start_method = "fork"
        return elastic_launch(config, _run_rank)

    with patch.object(torchrun, "elastic_launch", launch), patch.object(tempfile, "tempdir", os.getcwd()):
        yield


def _run_rank(unbuffered: str, script: str, *arguments: str) -> None:
    """What Python would be called with, of which the first is -u."""
    if "ACCELERATE_USE_FSDP" in os.environ:
        distributed.init_process_group("gloo")
        pass_for_gpus()
    call_main(Path(script), *_shortened(script, [*arguments]))


def _make(targets: list[str]) -> None:
    outside = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    command = ["make", "--no-print-directory", "--dry-run", *targets]
    done = subprocess.run(command, env=outside, capture_output=True, text=True)
    assert done.returncode == 0 and "Nothing to be done" not in done.stdout, done.stdout + done.stderr
    for line in done.stdout.splitlines():
        if line.startswith(".venv/bin/python scripts/"):
            run_commands(line.replace(".venv/bin/python", "python"))


def _install(words: list[str]) -> None:
    packages = [word for word in words if word != "--no-deps"]
    for word in packages:
        assert word.startswith("./") or _is_known(word), f"{word} is no package that the project knows"
    here = [word for word in packages if word.startswith("./")]
    if here:
        options = "--no-deps --no-build-isolation --no-index --disable-pip-version-check --target installed"
        done = subprocess.run(
            [sys.executable, "-m", "pip", "install", *here, *options.split()], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


def _is_known(word: str) -> bool:
    """Whether it is a package that the project needs, in versions that it is tested with."""
    wanted = Requirement(word)
    lines = [line for file in Path().glob("requirements*.txt") for line in file.read_text().splitlines()]
    pins = [line.split("==") for line in lines if not line.startswith("#")]
    pinned = any(name == wanted.name and version in wanted.specifier for name, version in pins)
    return pinned or wanted.name in OTHER_PACKAGES
