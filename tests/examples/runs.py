"""Runs of examples/finetune.py on its small model: their sizes, and what is read of what they print and leave."""

import json
import re
import subprocess
import time
from pathlib import Path

from tests.programs import Fork

SMALL = ("--seq-len", "32", "--batch-size", "4", "--save-every", "4")
WHOLE = ("--bits", "16", *SMALL)
"""The small model is trained whole."""
ADAPTER = (*SMALL, "--expert-rank", "2")
STEPS = 20


def before_and_after(printed: str) -> tuple[float, float]:
    """The held-out losses of the final table."""
    return tuple(float(re.search(rf"loss {word}, held-out text +(\S+)", printed)[1]) for word in ("before", "after"))


def losses_of(output: Path, steps: int = STEPS) -> list[tuple[int, str, float]]:
    """(step, which, value) of every loss and gradient norm in the training log of the last checkpoint."""
    kinds = ("loss", "eval_loss", "grad_norm")
    return [(entry["step"], kind, entry[kind]) for entry in log_of(output, steps) for kind in kinds if kind in entry]


def log_of(output: Path, steps: int = STEPS) -> list[dict]:
    """The training log of the last checkpoint."""
    return json.loads((output / "checkpoints" / f"checkpoint-{steps}" / "trainer_state.json").read_text())[
        "log_history"
    ]


def kill_after_a_checkpoint(run: subprocess.Popen | Fork, output: Path) -> None:
    """By SIGKILL, between steps or while saving."""
    with run as process:
        while not list(output.glob("checkpoints/checkpoint-*/trainer_state.json")):
            assert process.poll() is None, "".join(process.communicate())
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -9 and not (output / "model").exists()
