"""Results on the disk, and what scripts leave there for the next time."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str) -> None:
    """Writes beside ``path`` and renames: whoever reads it, at any time, finds a whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text)
    beside.replace(path)


def made(folder: Path, make: Callable[..., None], *arguments: Any) -> Path:
    """``folder``. If it is not there, ``make(folder, *arguments)`` fills it, in a process that then leaves the GPU and
    that nothing imported here has changed."""
    if not folder.exists():
        beside = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(beside, ignore_errors=True)
        maker = multiprocessing.get_context("spawn").Process(target=make, args=(beside, *arguments))
        maker.start()
        maker.join()
        if maker.exitcode:
            raise SystemExit(f"{folder} could not be made")
        beside.rename(folder)
    return folder
