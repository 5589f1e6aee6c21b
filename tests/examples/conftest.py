"""examples/finetune.py as a user runs it: a command, and two runs that several tests look at."""

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from filelock import FileLock

from tests import programs
from tests.conftest import ROOT
from tests.examples.runs import ADAPTER, STEPS, WHOLE

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """Two documents, few enough that evaluation takes no time."""
    path = tmp_path_factory.mktemp("text") / "notes.jsonl"
    documents = ["A grouped product multiplies every row by the matrix of its own expert. " * 60, "A short one. " * 40]
    path.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    return path


@pytest.fixture(scope="session")
def variables(kernel_dir) -> dict[str, str]:
    """Of a user who has built the kernel."""
    paths = os.pathsep.join(map(str, (ROOT / "integration", EXAMPLES, os.environ.get("PYTHONPATH", ""))))
    return {"LOCAL_KERNELS": f"org/qwen3-moe-fused={kernel_dir}", "PYTHONPATH": paths}


@pytest.fixture(scope="session")
def start(variables) -> Callable:
    return partial(programs.start, EXAMPLES / "finetune.py", variables=variables)


@pytest.fixture(scope="session")
def finetune(variables) -> Callable[..., str]:
    def run(*arguments, code: int = 0, script: Path = EXAMPLES / "finetune.py", most=None, fresh=False, **others):
        done = programs.run(script, *arguments, variables=variables | others, most=most, fresh=fresh)
        printed = done.stdout + done.stderr
        assert done.returncode == code, printed
        return printed

    return run


@pytest.fixture(scope="session")
def once(request, tmp_path_factory) -> Callable[..., Path]:
    """``once(name, make)``: a folder that ``make(folder)`` fills for all processes which share a run's tests."""
    shared = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        shared = shared.parent  # a process of several has a folder of its own in that of the run

    def once(name: str, make: Callable[[Path], None]) -> Path:
        folder, made = shared / name, shared / f"{name}-made"
        with FileLock(shared / f"{name}.lock"):
            if not made.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a process in which it failed
                folder.mkdir()
                make(folder)
                made.touch()
        return folder

    return once


@pytest.fixture(scope="session")
def whole(finetune, text, once) -> Path:
    """The folder of a run that nothing interrupted, one epoch and a half long, and what it printed. A new Python runs
    it, as a user's does: the other runs are forks."""

    def train(output: Path) -> None:
        arguments = ("--dataset", text, "--output", output, "--steps", STEPS, *WHOLE)
        (output / "printed").write_text(finetune(*arguments, fresh=True))

    return once("whole", train)


@pytest.fixture(scope="session")
def adapter(finetune, text, whole, once) -> Path:
    """The folder of a run, as long, that trained a LoRA of attention and experts in 4 bit, and what it printed."""

    def train(output: Path) -> None:
        (output / "small-qwen3-moe").symlink_to(whole / "small-qwen3-moe")
        arguments = ("--dataset", text, "--output", output, "--steps", STEPS, *ADAPTER)
        (output / "printed").write_text(finetune(*arguments))

    return once("adapter", train)
