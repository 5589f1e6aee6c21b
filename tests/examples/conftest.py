"""examples/finetune.py as a user runs it: a command, and two runs that several tests look at."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

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
def start(kernel_dir) -> Callable[..., subprocess.Popen]:
    def start(*arguments, script=(EXAMPLES / "finetune.py",), preexec_fn=None, **variables: str) -> subprocess.Popen:
        variables["LOCAL_KERNELS"] = f"org/qwen3-moe-fused={kernel_dir}"
        variables["HF_HUB_OFFLINE"] = "1"
        paths = (ROOT / "integration", EXAMPLES, os.environ.get("PYTHONPATH", ""))
        variables["PYTHONPATH"] = os.pathsep.join(map(str, paths))
        command = [sys.executable, *map(str, script), *map(str, arguments)]
        settings = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "preexec_fn": preexec_fn}
        return subprocess.Popen(command, env=os.environ | variables, **settings)

    return start


@pytest.fixture(scope="session")
def finetune(start):
    def run(*arguments, code: int = 0, **settings) -> str:
        with start(*arguments, **settings) as process:
            printed, _ = process.communicate(timeout=600)
        assert process.returncode == code, printed
        return printed

    return run


@pytest.fixture(scope="session")
def whole(finetune, text, tmp_path_factory) -> Path:
    """The folder of a run that nothing interrupted, one epoch and a half long, and what it printed."""
    output = tmp_path_factory.mktemp("whole")
    (output / "printed").write_text(finetune("--dataset", text, "--output", output, "--steps", STEPS, *WHOLE))
    return output


@pytest.fixture(scope="session")
def adapter(finetune, text, whole, tmp_path_factory) -> Path:
    """The folder of a run, as long, that trained a LoRA of attention and experts in 4 bit, and what it printed."""
    output = tmp_path_factory.mktemp("adapter")
    (output / "small-qwen3-moe").symlink_to(whole / "small-qwen3-moe")
    (output / "printed").write_text(finetune("--dataset", text, "--output", output, "--steps", STEPS, *ADAPTER))
    return output
