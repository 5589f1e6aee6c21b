"""Safetensors files as a stream: a part of a tensor is read at a time, and written before the next is made.

A file is the length of its header in 8 bytes, the header, and the tensors' bytes one after the other. Reading by hand
keeps memory at the part, where a mapped file would count as a whole.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch
from safetensors import SafetensorError, safe_open

from .folder import read_json, require_safetensors, write_json

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
CHUNK = 2**24
"""Bytes of a tensor that are in memory at once, when it is passed on as it is."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
}
"""The dtypes of which values are looked at; of others only bytes are passed on."""


@dataclass(frozen=True)
class Stored:
    """Where a tensor is: ``begin`` and ``end`` are its bytes in ``file``, ``dtype`` as safetensors spells it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Shards:
    """The tensors of a checkpoint.

    Attributes:
        stored: where each tensor is, by its key.
        largest: bytes of the tensors in the file that has most.

    Raises:
        FileNotFoundError: there is no checkpoint, or a shard is missing.
        ValueError: weights are pickled, a file is damaged, or the index is not about these files.
    """

    def __init__(self, folder: Path):
        self.stored: dict[str, Stored] = {}
        self._open: Optional[tuple[Path, object]] = None
        files, index = _files(folder)
        for file in files:
            for key, stored in _header(file):
                if key in self.stored:
                    raise ValueError(f"{key} is in two files, {self.stored[key].file.name} and {file.name}")
                self.stored[key] = stored
        if index is not None:
            for key in sorted(index.keys() | self.stored.keys()):
                found = self.stored[key].file.name if key in self.stored else None
                if index.get(key) != found:
                    raise ValueError(f"{folder / INDEX} has {key} in {index.get(key)}, but it is in {found}")
        sizes = Counter()
        for stored in self.stored.values():
            sizes[stored.file] += stored.end - stored.begin
        self.largest = max(sizes.values(), default=0)

    def read(self, key: str, part: int = 0, parts: int = 1) -> torch.Tensor:
        """(values,) of one of equal parts of a tensor, as many bytes if its dtype is not in ``DTYPES``."""
        stored = self.stored[key]
        length = (stored.end - stored.begin) // parts
        raw = self._bytes(stored, stored.begin + part * length, length)
        return torch.frombuffer(raw, dtype=DTYPES.get(stored.dtype, torch.uint8)) if length else torch.empty(0)

    def chunks(self, key: str) -> Iterator[torch.Tensor]:
        """The whole tensor, piece by piece."""
        stored = self.stored[key]
        for begin in range(stored.begin, stored.end, CHUNK):
            raw = self._bytes(stored, begin, min(CHUNK, stored.end - begin))
            yield torch.frombuffer(raw, dtype=DTYPES.get(stored.dtype, torch.uint8))

    def _bytes(self, stored: Stored, begin: int, length: int) -> bytearray:
        if self._open is None or self._open[0] != stored.file:
            self.close()
            self._open = (stored.file, stored.file.open("rb"))
        raw, stream = bytearray(length), self._open[1]
        stream.seek(begin)
        if stream.readinto(raw) != length:
            raise ValueError(f"{stored.file} has become shorter while it was read")
        return raw

    def close(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None


def _files(folder: Path) -> tuple[list[Path], Optional[dict[str, str]]]:
    """The files of a checkpoint and the index over them, if there is one."""
    if not (folder / INDEX).is_file():
        return [require_safetensors(folder, SINGLE)], None
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise ValueError(f"{folder / INDEX} must have a weight_map")
    for name in index.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{folder / INDEX} names {name!r}, which is no safetensors file in the same folder")
    return [require_safetensors(folder, name) for name in sorted(set(index.values()))], index


def _header(file: Path) -> Iterator[tuple[str, Stored]]:
    try:
        with safe_open(file, "pt"):  # checks that the header is sound and the file complete
            pass
    except SafetensorError as error:
        raise ValueError(f"{file} is no readable safetensors file: {error}") from error
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    for key, entry in header.items():
        if key != "__metadata__":
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            yield key, Stored(file, entry["dtype"], tuple(entry["shape"]), begin, end)


@dataclass(frozen=True)
class Output:
    """A tensor to write: ``parts`` makes its values one after the other, ``size`` bytes in all."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    parts: Callable[[], Iterable[torch.Tensor]]


def write_shards(folder: Path, outputs: list[Output], limit: int, progress: Callable[[int], object]) -> None:
    """Writes ``outputs`` in order, in files of at most ``limit`` bytes unless one tensor is more.

    Args:
        progress: called with the number of bytes just written.
    """
    shards, size = [[]], 0
    for output in outputs:
        if shards[-1] and size + output.size > limit:
            shards.append([])
            size = 0
        shards[-1].append(output)
        size += output.size
    if len(shards) == 1:
        _write(folder / SINGLE, outputs, progress)
        return
    index = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write(folder / name, shard, progress)
        index.update({output.key: name for output in shard})
    total = {"total_size": sum(output.size for output in outputs)}
    write_json(folder / INDEX, {"metadata": total, "weight_map": index})


def _write(path: Path, outputs: list[Output], progress: Callable[[int], object]) -> None:
    # Wider values first, so that every tensor begins at a multiple of its values' width.
    outputs = sorted(outputs, key=lambda output: (-_width(output), output.key))
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for output in outputs:
        header[output.key] = {
            "dtype": output.dtype,
            "shape": list(output.shape),
            "data_offsets": [offset, offset + output.size],
        }
        offset += output.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for output in outputs:
            written = 0
            for part in output.parts():
                raw = part.contiguous().flatten().view(torch.uint8).numpy()
                stream.write(raw)
                written += len(raw)
                progress(len(raw))
            if written != output.size:
                raise ValueError(f"{output.key} has {written} bytes instead of {output.size}")
        stream.flush()
        os.fsync(stream.fileno())


def _width(output: Output) -> int:
    values = 1
    for length in output.shape:
        values *= length
    return output.size // values if values else 0
