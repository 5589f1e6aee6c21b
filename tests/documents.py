"""Markdown pages as programs: a page's code blocks, one after another, as they stand, in a process of their own.

Names that a reader would replace stand for files that are there: a page runs in a folder that has a small model as
``Qwen/Qwen3-30B-A3B``, a text as ``notes.jsonl``, and so on. A comment right before a block says what it needs:

    <!-- needs: gpu -->    runs only where there is one
    <!-- needs: hub -->    runs against the tests' own Hub, in tests/hub
    <!-- needs: ranks -->  runs in two processes, as torchrun starts them

Commands that train a model or use it run for a few steps. Those that measure, tune, install, or start several processes
are not run, but each is read as it would be: a script's parser takes its options, a package is one that the project
knows.
"""

import importlib
import multiprocessing
import os
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, NamedTuple
from unittest.mock import patch

import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from packaging.requirements import Requirement
from torch.distributed import run as torchrun

from tests.integration.distributed.ranks import run_on_ranks, start_server

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ROOT / "tests/packages"
"""Stand-ins for packages that need a GPU."""
OTHER_PACKAGES = {"liger-kernel", "grouped-nf4-gemm", "unsloth"}
"""What pages have a reader install, beside what the requirements pin."""
SHORTENED = {
    "examples/finetune.py": "--steps 2 --save-every 1 --seq-len 32",
    "examples/finetune_unsloth.py": "--steps 2 --seq-len 32",
    "examples/generate.py": "--tokens 2",
    "scripts/build_kernel.py": "--out build",
}
"""The scripts that run, and what is added to their options: a few steps or tokens, and a build in the page's folder."""

_FENCE = re.compile(r"(?:<!-- needs: (?P<needs>\w+) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)


class Block(NamedTuple):
    """``line`` is that of the first line of code; ``needs`` is "gpu", "hub" or empty."""

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
    one where there is a GPU, for what a library has asked CUDA cannot be forked, and where Triton is to interpret,
    which it decides as it is imported.
    """
    new = torch.cuda.is_available() or "TRITON_INTERPRET" in environment
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
    torch.set_num_threads(1)
    _in_folder(function, arguments, folder, environment)


def _in_folder(function: Callable, arguments: tuple, folder: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    sys.path.insert(0, str(ROOT / "integration"))
    sys.path.append(str(PACKAGES))  # last: where such a package is installed, that one is taken
    os.chdir(folder)
    function(*arguments)


def call_main(script: Path, *arguments: Any) -> None:
    """Imports a script and calls its ``main``, as its command line would."""
    _import(script).main([*map(str, arguments)])


def _import(script: Path) -> ModuleType:
    sys.path.insert(0, str(script.parent))
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
    """Runs them one after another, or reads those that are not run; an AssertionError names the line that is wrong."""
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
    elif words[0] == "python" and words[1] in SHORTENED:
        call_main(ROOT / words[1], *words[2:], *SHORTENED[words[1]].split())
    elif words[0] == "python":
        _parse(words[1], words[2:])
    elif words[:2] == ["accelerate", "launch"]:
        options = launch_command_parser().parse_args(words[2:])
        options.config_file = str(ROOT / options.config_file)
        _validate_launch_command(options)
        _parse(options.training_script, options.training_script_args)
    elif words[0] == "torchrun":
        options = torchrun.get_args_parser().parse_args(words[1:])
        _parse(options.training_script, options.training_script_args)
    elif words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(words[1:]) <= {*targets}, f"targets are {targets}"
    elif words[:2] == ["pip", "install"]:
        for word in words[2:]:
            assert word == "--no-deps" or _is_package(word), f"{word} is no package that the project knows"
    elif words == ["kernels", "benchmark", "."]:
        assert [*(ROOT / "benchmarks").glob("benchmark*.py")]
    else:
        raise AssertionError("a command that this test does not know")


def _parse(script: str, arguments: list[str]) -> None:
    """Has a script's own parser read its arguments, by which one that is wrong is an error."""
    _import(ROOT / script).parse(arguments)


def _is_package(word: str) -> bool:
    """Whether it is a package in this repository, or one that the project needs, in versions that it is tested with."""
    if word.startswith("./"):
        return (ROOT / word / "pyproject.toml").is_file()
    wanted = Requirement(word)
    lines = [line for file in ROOT.glob("requirements*.txt") for line in file.read_text().splitlines()]
    pins = [line.split("==") for line in lines if not line.startswith("#")]
    pinned = any(name == wanted.name and version in wanted.specifier for name, version in pins)
    return pinned or wanted.name in OTHER_PACKAGES
