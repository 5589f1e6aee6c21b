"""A run's checkpoints: which of them are complete, and what is written when the disk is full."""

import argparse
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from accelerate import PartialState
from transformers import Trainer

FULL = (
    *map(os.strerror, (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)),
    "unexpected pos",
    "PytorchStreamWriter failed",
)
"""What errors say of a disk that is full: Python's, safetensors' too, which are no OSError; and torch.save's."""


def complete_checkpoints(folder: Path) -> dict[int, Path]:
    """Those of a folder, by step. The Trainer writes its own state last, of which a kill or a full disk may leave but a
    part."""
    folders = sorted(folder.glob("checkpoint-*"), reverse=True)  # of a checkpoint and its copy the shorter name counts
    return {step: each for each in folders if (step := _step(each)) is not None}


def _step(folder: Path) -> int | None:
    """That of a complete checkpoint."""
    with suppress(FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    return None


def checkpoint_to_resume(options: argparse.Namespace) -> Path | None:
    """The newest complete one with --resume. Without, there must be none: a run that is killed before it has come as
    far as an earlier one would go on as that."""
    folder = options.output / "checkpoints"
    found = complete_checkpoints(folder)
    if options.resume and not found:
        raise SystemExit(f"--resume: there is no complete checkpoint in {folder}")
    if found and not options.resume:
        raise SystemExit(
            f"--output: {folder} has checkpoints of an earlier run; go on from them with --resume, or give another "
            "--output, or remove them"
        )
    return found[max(found)] if found else None


def remove_incomplete(output: Path) -> None:
    """The Trainer, which keeps two, would count them, and remove a complete one for their sake. Folders that it has not
    named stay. Every process may call it, before any has begun to train."""
    for folder in (output / "checkpoints").glob("checkpoint-*"):
        if re.fullmatch(r"checkpoint-\d+", folder.name) and _step(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)


def save(trainer: Trainer, folder: Path) -> None:
    """The trained model, or its adapter; ``folder`` is replaced only when the new one is complete.

    Every process takes part, for what is sharded has to be gathered; the first one writes.
    """
    beside = folder.with_name(folder.name + ".part")
    processes = PartialState()
    if processes.is_main_process:
        shutil.rmtree(beside, ignore_errors=True)
    processes.wait_for_everyone()
    trainer.save_model(str(beside))
    if processes.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        beside.rename(folder)


@contextmanager
def full_disk_explained(output: Path) -> Iterator[None]:
    """Ends a run whose files find no room in ``output`` with what is there to go on from."""
    try:
        yield
    except Exception as error:
        if not any(words in str(error) for words in FULL):
            raise
        good = complete_checkpoints(output / "checkpoints")
        left = f"{good[max(good)]} is complete: make room, then --resume." if good else "No checkpoint is complete yet."
        raise SystemExit(f"Nothing more could be written to {output}, as on a full disk ({error}). {left}") from error
