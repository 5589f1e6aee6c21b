"""What is looked at in a checkpoint's files before anything is loaded from them.

Transformers writes a model into the folder itself: config.json, then the weights file by file. If that is cut short
over an older checkpoint, the folder holds files of two models and still looks whole. So each save puts an id of its own
into config.json and into every file of weights, and only files with the same id are loaded.
"""

import json
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Optional

SAVE_ID = "save_id"


def new_save_id() -> str:
    return secrets.token_hex(8)


def check_files(files: Iterable[str], save_id: Optional[str]) -> set[str]:
    """The names of all tensors in these safetensors files.

    Args:
        files: of one checkpoint; those of another format are passed by.
        save_id: what config.json has; None if it has none.

    Raises:
        ValueError: a file is not whole, or is of another save than config.json.
    """
    names = set()
    for file in map(Path, files):
        if file.suffix == ".safetensors":
            header = _read_header(file)
            found = header.pop("__metadata__", {}).get(SAVE_ID)
            if save_id is not None and found != save_id:
                raise ValueError(
                    f"{file} and its config.json are of different saves ({SAVE_ID} {found} and {save_id}): a save into "
                    "this folder was interrupted. Save the model again."
                )
            names |= header.keys()
    return names


def _read_header(file: Path) -> dict:
    """The header of a safetensors file: a length in 8 bytes, and JSON that says where each tensor begins and ends."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if 8 + length > size:
            raise ValueError(f"{file} is truncated: {size} bytes are less than its header")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise ValueError(f"{file} is no safetensors file: {error}") from None
    ends = {name: entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
    last = max(ends, key=ends.get, default=None)
    if last is not None and 8 + length + ends[last] != size:
        raise ValueError(f"{file} is truncated: {last} ends at byte {8 + length + ends[last]} of {size}")
    return header
