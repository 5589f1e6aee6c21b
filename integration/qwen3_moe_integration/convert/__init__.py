"""Conversion of adapters and checkpoints between the layouts of Transformers v4, v5 with PEFT, and the 2025 project.

Adapters, in memory as a whole: ``factors`` of one weight, ``gate_up`` joins and splits them; ``layout`` and its three
``per_expert``, ``target_parameters``, ``fused_2025`` are names and shapes on disk; ``lora_config`` is the
configuration; ``adapter`` puts it together, ``adapter_check`` compares.

Checkpoints, as a stream: ``shards`` reads and writes parts of tensors, ``weights`` says which expert lies where,
``four_bit`` what bitsandbytes saves beside it; ``checkpoint`` puts it together, ``checkpoint_conversion`` converts.
"""

from os import PathLike
from pathlib import Path
from typing import Union

from . import checkpoint_conversion, folder
from .adapter import LAYOUTS, Adapter, layout_of, pack, unpack
from .adapter_check import assert_same
from .weights import WEIGHT_LAYOUTS

ADAPTER_FORMATS = tuple(LAYOUTS)
CHECKPOINT_FORMATS = WEIGHT_LAYOUTS
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

AnyPath = Union[str, PathLike]

__all__ = [
    "ADAPTER_FORMATS",
    "CHECKPOINT_FORMATS",
    "Adapter",
    "convert",
    "convert_adapter",
    "convert_checkpoint",
    "layout_of",
    "pack",
    "read_adapter",
    "unpack",
]


def read_adapter(source: AnyPath) -> Adapter:
    """The adapter in a folder, whichever of ``ADAPTER_FORMATS`` it is in.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the weights are pickled, or the adapter is not plain LoRA, incomplete, or of no known layout.
    """
    source = Path(source)
    weights = folder.require_safetensors(source, ADAPTER_WEIGHTS)
    tensors, metadata = folder.read_tensors(weights)
    return unpack(tensors, folder.read_json(source / ADAPTER_CONFIG), metadata)


def convert_adapter(source: AnyPath, target: AnyPath, to: str, uniform: bool = False, check: bool = False) -> None:
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
        tensors, config, metadata = pack(adapter, to, uniform)
        folder.write_tensors(unfinished / ADAPTER_WEIGHTS, tensors, metadata)
        folder.write_json(unfinished / ADAPTER_CONFIG, config)
        folder.copy_companions(source, unfinished)
        if check:
            assert_same(adapter, read_adapter(unfinished))


def convert_checkpoint(source: AnyPath, target: AnyPath, to: str, check: bool = False) -> None:
    """Writes a model's weights again with the experts in another layout, dense or in 4 bit, bit for bit.

    Memory is that of one expert's matrix. Scales of 4-bit weights that are quantized themselves (double quantization)
    stay so where the new tensor can hold them exactly and are decoded to fp32 otherwise: then the experts take 0.37 bit
    a weight more, and every weight decodes to the same bits.

    Args:
        source: a folder with ``model.safetensors``, or shards and their index; it is only read.
        target: the folder to write, which must not exist; it appears when it is complete.
        to: one of ``CHECKPOINT_FORMATS``.
        check: read the written checkpoint again and compare every weight before it appears.

    Raises:
        FileExistsError: ``target`` exists.
        FileNotFoundError: a file is missing.
        ValueError: ``to`` is unknown; weights are pickled, damaged, incomplete or not finite; or the check failed.
    """
    if to not in CHECKPOINT_FORMATS:
        raise ValueError(f"to must be one of {[*CHECKPOINT_FORMATS]} for a checkpoint, got {to!r}")
    with folder.new_folder(Path(target), Path(source)) as unfinished:
        checkpoint_conversion.convert(Path(source), unfinished, to, check)


def convert(source: AnyPath, target: AnyPath, to: str, uniform: bool = False, check: bool = False) -> None:
    """:func:`convert_adapter` or :func:`convert_checkpoint`, whichever ``source`` is."""
    if (Path(source) / ADAPTER_CONFIG).is_file():
        return convert_adapter(source, target, to, uniform, check)
    if uniform:
        raise ValueError(f"uniform is for adapters, and {source} has no {ADAPTER_CONFIG}")
    return convert_checkpoint(source, target, to, check)
