"""examples/finetune.py, the same program for one process and for several: same losses, same files."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.integration import graphs
from tests.integration.distributed.launch import apply_config
from tests.integration.distributed.ranks import run_on_ranks
from tests.integration.models import RATIO
from tests.kernel.oracle import assert_close

STEPS, BATCH = 4, 4
ROUTERS_RATIO = 3e-4
"""The routers' loss, which TRL adds a thousandth of, is of a rank's own tokens."""


def finetune(kernel_dir: Path, output: Path, config: str, arguments: list[str]) -> None:
    graphs.stand_in()
    if config:
        apply_config(config)
    sys.path.insert(0, str(ROOT / "examples"))
    sys.argv = ["finetune.py", "--output", str(output), "--kernel", str(kernel_dir), *map(str, arguments)]
    program = runpy.run_path(str(ROOT / "examples" / "finetune.py"))
    trainer = program["train"](program["parse"]())
    if "--graphs" in arguments:
        assert graphs.recordings(trainer.model) == 3


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "notes.txt"
    path.write_text("A grouped product multiplies every row by the matrix of its own expert. " * 60)
    return path


@pytest.mark.parametrize(
    ("config", "bits", "trainer", "checkpointing"),
    [
        ("ddp", 4, "trainer", ["--gradient-checkpointing", "--graphs"]),
        ("ddp", 4, "sft", []),
        ("fsdp2", 4, "trainer", []),
        ("fsdp2", 16, "trainer", []),
    ],
)
def test_two_processes_train_as_one(server, kernel_dir, text, tmp_path, config, bits, trainer, checkpointing):
    settings = [
        "--dataset",
        text,
        "--bits",
        bits,
        "--steps",
        STEPS,
        "--save-every",
        STEPS // 2,
        "--seq-len",
        16,
        "--expert-rank",
        4,
        "--trainer",
        trainer,
    ]
    for name, ranks in (("alone", 1), (config, 2)):
        arguments = [*settings, "--batch-size", BATCH // ranks, *(checkpointing if ranks > 1 else [])]
        run_on_ranks(ranks, finetune, kernel_dir, tmp_path / name, config if ranks > 1 else "", arguments)
    want, got = losses(tmp_path / "alone"), losses(tmp_path / config)
    assert_close("losses", want, got, RATIO if trainer == "trainer" else ROUTERS_RATIO)
    files = [sorted(path.name for path in (tmp_path / name / "model").iterdir()) for name in ("alone", config)]
    assert files[0] == files[1]


def losses(output: Path) -> torch.Tensor:
    """Of every step and evaluation."""
    state = json.loads((output / "checkpoints" / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return torch.tensor([entry[k] for entry in state["log_history"] for k in ("loss", "eval_loss") if k in entry])
