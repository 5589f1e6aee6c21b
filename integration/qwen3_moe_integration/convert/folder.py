"""Folders of safetensors files: read without trust, written so that only a finished one is ever seen.

A folder is written under another name beside its place, brought to the disk and renamed. Whatever ends the work
before that leaves the place empty, and what was read is never opened for writing.
"""

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

Tensor = torch.Tensor

PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
COMPANIONS = {".json", ".txt", ".jinja", ".md", ".model", ".tiktoken"}
"""Files that belong to weights: configurations, tokenizers, model cards. Nothing else is copied."""


def require_safetensors(folder: Path, name: str) -> Path:
    """``folder / name``, which must be there; weights in a pickle, which can run code, are refused by name."""
    path = folder / name
    if path.is_file():
        return path
    pickles = sorted(each.name for each in folder.iterdir() if each.suffix in PICKLES) if folder.is_dir() else []
    if pickles:
        raise ValueError(f"{folder} has its weights in {pickles}: only safetensors are read, pickles can run code")
    raise FileNotFoundError(f"{path} is missing")


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object, got {type(content).__name__}")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        return load_file(path), metadata
    except SafetensorError as error:
        raise ValueError(f"{path} is no readable safetensors file: {error}") from error


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    save_file(tensors, path, metadata={"format": "pt", **metadata})


def copy_companions(source: Path, target: Path, leave_out: str = "") -> None:
    """Copies what lies beside the weights and is not there yet."""
    for path in sorted(source.iterdir()):
        if path.name == leave_out or (target / path.name).exists():
            continue
        if path.is_file() and path.suffix in COMPANIONS:
            shutil.copyfile(path, target / path.name)


@contextmanager
def new_folder(target: Path, beside: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``target`` if the block ends without an error and is deleted otherwise.

    Raises:
        FileExistsError: ``target`` exists.
        ValueError: ``target`` is inside ``beside``, which is read.
    """
    target, beside = Path(os.path.abspath(target)), beside.resolve()
    if os.path.lexists(target):
        raise FileExistsError(f"{target} exists; name a new folder, or delete it first")
    if beside in target.resolve().parents:
        raise ValueError(f"{target} must not be inside {beside}, which is only read")
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{secrets.token_hex(4)}.unfinished")
    unfinished.mkdir()
    try:
        yield unfinished
        for path in (*unfinished.iterdir(), unfinished):
            _to_disk(path)
        if os.path.lexists(target):
            raise FileExistsError(f"{target} has been made by somebody else meanwhile")
        unfinished.rename(target)
        _to_disk(target.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
