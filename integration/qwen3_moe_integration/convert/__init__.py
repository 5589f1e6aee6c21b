"""Conversion of adapters between the layouts of Transformers v4, of PEFT, and of the 2025 project."""

from os import PathLike
from pathlib import Path
from typing import Union

from . import folder
from .adapter import LAYOUTS, Adapter, layout_of, pack, unpack
from .check import assert_same

ADAPTER_FORMATS = tuple(LAYOUTS)
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

Path_ = Union[str, PathLike]

__all__ = ["ADAPTER_FORMATS", "Adapter", "convert_adapter", "layout_of", "pack", "read_adapter", "unpack"]


def read_adapter(source: Path_) -> Adapter:
    """The adapter in a folder, whichever of ``ADAPTER_FORMATS`` it is in.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the weights are pickled, or the adapter is not plain LoRA, incomplete, or of no known layout.
    """
    source = Path(source)
    weights = folder.require_safetensors(source, ADAPTER_WEIGHTS)
    return unpack(folder.read_tensors(weights), folder.read_json(source / ADAPTER_CONFIG))


def convert_adapter(source: Path_, target: Path_, to: str, uniform: bool = False, check: bool = False) -> None:
    """Writes a LoRA adapter again in another layout.

    Every product ``scaling * B @ A`` stays as it is, and so do the bits of the factors where the layout has room for
    them. Other tensors and the files beside the weights are copied.

    Args:
        source: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``; it is only read.
        target: the folder to write, which must not exist; it appears when it is complete.
        to: one of ``ADAPTER_FORMATS``.
        uniform: give everything one rank and scaling 1, for tools that read ``r`` and ``lora_alpha`` alone.
        check: read the written adapter again and compare the products of every expert before it appears.

    Raises:
        FileExistsError: ``target`` exists.
        FileNotFoundError, ValueError: as :func:`read_adapter` does; or ``to`` is unknown, or the check failed.
    """
    if to not in LAYOUTS:
        raise ValueError(f"to must be one of {[*LAYOUTS]} for an adapter, got {to!r}")
    source = Path(source)
    with folder.new_folder(Path(target), source) as unfinished:
        adapter = read_adapter(source)
        tensors, config = pack(adapter, to, uniform)
        folder.write_tensors(unfinished / ADAPTER_WEIGHTS, tensors)
        folder.write_json(unfinished / ADAPTER_CONFIG, config)
        folder.copy_companions(source, unfinished)
        if check:
            assert_same(adapter, read_adapter(unfinished))
