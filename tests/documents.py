"""Markdown pages as programs: a page's code blocks, one after another, as they stand, in a process of their own.

Names that a reader would replace stand for files that are there: a page runs in a folder that has a small model as
``Qwen/Qwen3-30B-A3B``, a text as ``notes.jsonl``, and so on. A comment right before a block says what it needs:

    <!-- needs: gpu -->    runs only where there is one
    <!-- needs: hub -->    runs against the tests' own Hub, in tests/hub
"""

import importlib
import io
import multiprocessing
import os
import re
import runpy
import shlex
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, Callable, NamedTuple
from unittest.mock import patch

import torch

from tests.integration.distributed.ranks import start_server

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ROOT / "tests/packages"
"""Stand-ins for packages that need a GPU."""

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
    os.environ.update(environment)
    sys.path.insert(0, str(ROOT / "integration"))
    sys.path.append(str(PACKAGES))  # last: where such a package is installed, that one is taken
    os.chdir(folder)
    torch.set_num_threads(1)
    function(*arguments)


def call_main(script: Path, *arguments: Any) -> None:
    """Imports a script and calls its ``main``, as its command line would."""
    sys.path.insert(0, str(script.parent))
    importlib.import_module(script.stem).main([*map(str, arguments)])


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
    """Commands of this project. Those that train, measure or set up are not run: their options are looked up."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        if words[:3] == ["python", "-m", "qwen3_moe_integration"]:
            from qwen3_moe_integration.__main__ import main

            assert main(words[3:]) == 0, line
        elif words[0] == "python":
            _check_options(ROOT / words[1], [word for word in words[2:] if word.startswith("--")])
        elif words[0] in ("accelerate", "torchrun"):
            files = [word for word in words if word.endswith((".py", ".yaml"))]
            assert all((ROOT / file).is_file() for file in files), line
            script = words.index(files[-1])
            _check_options(ROOT / files[-1], [word for word in words[script + 1 :] if word.startswith("--")])
        elif words[0] == "make":
            assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(), line
        elif words[:2] == ["pip", "install"]:
            assert all((ROOT / word).is_dir() for word in words[2:] if "/" in word), line
        elif words == ["kernels", "benchmark", "."]:
            assert [*(ROOT / "benchmarks").glob("benchmark*.py")]
        else:
            raise AssertionError(f"a command that this test does not know: {line}")


def _check_options(script: Path, options: list[str]) -> None:
    """Each is one that the script's ``--help`` has."""
    printed, arguments, path = io.StringIO(), sys.argv, [*sys.path]
    sys.argv, sys.path[:0] = [str(script), "--help"], [str(script.parent)]
    try:
        with redirect_stdout(printed), redirect_stderr(printed):
            runpy.run_path(str(script), run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, printed.getvalue()
    finally:
        sys.argv, sys.path[:] = arguments, path
    missing = [option for option in options if not re.search(rf"{option}\b", printed.getvalue())]
    assert not missing, f"{script.name} has no {', '.join(missing)}"
