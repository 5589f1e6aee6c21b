"""A checkpoint written again in another layout of its experts, one matrix in memory at a time."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from . import folder
from .checkpoint import CONFIG, Checkpoint, check_finite
from .four_bit import NESTED, joint_state
from .shards import DTYPES, INDEX, Output, Shards, write_shards
from .weights import Matrix, Weight, weights

Tensor = torch.Tensor

STOCK_METHOD, STACKED_METHOD = "bitsandbytes", "bitsandbytes_moe"
"""Names of quantizers in config.json: Transformers' own knows no stacks of experts in 4 bit, the second does."""


def convert(source: Path, target: Path, to: str, check: bool) -> None:
    """Writes ``target``, a folder that exists and is empty; ``to`` is one of ``WEIGHT_LAYOUTS``."""
    checkpoint = Checkpoint(source)
    outputs = list(_outputs(checkpoint, to))
    with tqdm(total=sum(output.size for output in outputs), unit="B", unit_scale=True, desc=f"writing {to}") as bar:
        write_shards(target, outputs, checkpoint.shards.largest, bar.update)
    if checkpoint.config:
        folder.write_json(target / CONFIG, _config(checkpoint, to))
    folder.copy_companions(source, target, leave_out=INDEX)
    if check:
        assert_same(checkpoint, Checkpoint(target))
    checkpoint.shards.close()


def _outputs(checkpoint: Checkpoint, to: str) -> Iterable[Output]:
    for key in checkpoint.others:
        yield _as_it_is(checkpoint.shards, key)
    for block in checkpoint.blocks:
        for weight in weights(to, block, *checkpoint.sizes):
            yield from _weight(checkpoint, weight)


def _as_it_is(shards: Shards, key: str) -> Output:
    stored = shards.stored[key]

    def parts() -> Iterable[Tensor]:
        for chunk in shards.chunks(key):
            check_finite(key, chunk)
            yield chunk

    return Output(key, stored.dtype, stored.shape, stored.end - stored.begin, parts)


def _weight(checkpoint: Checkpoint, weight: Weight) -> Iterable[Output]:
    shards = checkpoint.shards
    keys = Counter(checkpoint.places[matrix].key for matrix in weight.matrices)
    stored = [shards.stored[key] for key in keys]
    if len(kinds := {(each.dtype, key in checkpoint.four_bit) for key, each in zip(keys, stored)}) > 1:
        raise ValueError(
            f"{weight.key}: all experts must have one dtype and quantization, got {sorted(map(str, kinds))}"
        )
    if stored[0].dtype not in DTYPES:
        raise ValueError(f"{weight.key}: experts in {stored[0].dtype} are not supported, only in {[*DTYPES]}")
    places = [checkpoint.places[matrix] for matrix in weight.matrices]
    size = sum((shards.stored[p.key].end - shards.stored[p.key].begin) // p.parts for p in places)
    four_bit = places[0].key in checkpoint.four_bit
    width = DTYPES[stored[0].dtype].itemsize
    shape = (size // width, 1) if four_bit else weight.shape
    yield Output(
        weight.key, stored[0].dtype, shape, size, lambda: (checkpoint.values(matrix) for matrix in weight.matrices)
    )
    if four_bit:
        yield from _statistics(checkpoint, weight)


def _statistics(checkpoint: Checkpoint, weight: Weight) -> Iterable[Output]:
    places = [checkpoint.places[matrix] for matrix in weight.matrices]
    parts = {place.key: (checkpoint.four_bit[place.key], place.parts) for place in places}
    state = joint_state(weight.key, weight.shape, list(parts.values()), len(places))
    first, shards = checkpoint.four_bit[places[0].key], checkpoint.shards
    blocks = -(-torch.Size(weight.shape).numel() // state["blocksize"])

    def tensor(name: str, values: Tensor) -> Output:
        dtype = next(spelling for spelling, dtype in DTYPES.items() if dtype == values.dtype)
        return Output(f"{weight.key}.{name}", dtype, tuple(values.shape), values.nbytes, lambda: [values])

    def statistic(name: str) -> Iterable[Tensor]:
        for place in places:
            key = checkpoint.four_bit[place.key].keys[name]
            values = shards.read(key, place.part, place.parts)
            check_finite(key, values)
            yield values

    def scales() -> Iterable[Tensor]:
        for matrix in weight.matrices:
            absmax = checkpoint.absmax(matrix)
            check_finite(f"{weight.key}.absmax", absmax)
            yield absmax

    if NESTED[0] in state:
        groups = -(-blocks // state["nested_blocksize"])
        yield Output(f"{weight.key}.absmax", "U8", (blocks,), blocks, lambda: statistic("absmax"))
        name = f"{weight.key}.nested_absmax"
        yield Output(name, "F32", (groups,), 4 * groups, lambda: statistic("nested_absmax"))
        yield tensor("nested_quant_map", first.codes[1])
    else:
        yield Output(f"{weight.key}.absmax", "F32", (blocks,), 4 * blocks, scales)
    yield tensor("quant_map", first.codes[0])
    text = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    yield tensor(f"quant_state.bitsandbytes__{state['quant_type']}", text)


def _config(checkpoint: Checkpoint, to: str) -> dict[str, Any]:
    """config.json with the quantizer that reads experts in 4 bit in this layout."""
    config = checkpoint.config
    quantization = config.get("quantization_config")
    if not checkpoint.four_bit or not isinstance(quantization, dict):
        return config
    left_out = {
        "quant_method",
        "experts_blocksize",
        "save_id",
        "load_in_4bit",
        "_load_in_4bit",
        "load_in_8bit",
        "_load_in_8bit",
    }
    fields = {name: value for name, value in quantization.items() if name not in left_out}
    if to == "stacked":
        blocksize = next(iter(checkpoint.four_bit.values())).state["blocksize"]
        fields.update(quant_method=STACKED_METHOD, experts_blocksize=blocksize)
    else:
        fields.update(quant_method=STOCK_METHOD, load_in_4bit=True, load_in_8bit=False)
    return {**config, "quantization_config": fields}


def assert_same(source: Checkpoint, written: Checkpoint) -> None:
    """Raises ValueError, naming the first tensor, unless all weights are the same bits, those in 4 bit decoded."""
    if source.places.keys() != written.places.keys() or set(source.others) != set(written.others):
        raise ValueError("the written checkpoint has other tensors")
    for key in source.others:
        one, other = source.shards.chunks(key), written.shards.chunks(key)
        if not all(_same_bits(*pair) for pair in zip(one, other)):
            raise ValueError(f"{key} is not what it was")
    for matrix in source.places:
        if not _same_matrix(source, written, matrix):
            raise ValueError(f"{'.'.join(map(str, matrix))} is not what it was")


def _same_matrix(source: Checkpoint, written: Checkpoint, matrix: Matrix) -> bool:
    if not _same_bits(source.values(matrix), written.values(matrix)):
        return False
    if source.places[matrix].key not in source.four_bit:
        return True
    one, other = (each.four_bit[each.places[matrix].key] for each in (source, written))
    same_scales = torch.equal(source.absmax(matrix), written.absmax(matrix))
    return same_scales and torch.equal(one.codes[0], other.codes[0]) and one.state["dtype"] == other.state["dtype"]


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))
