"""What bitsandbytes saves beside a packed weight, and how it changes when matrices are put together or apart.

Packed bytes and scales (absmax) of a matrix go along with it. Scales that are themselves quantized ("nested") keep
their bytes only where the tensors they come from agree in codebook and offset, and where no group of scales lies
across two matrices: an offset is one number a tensor. Otherwise the scales are decoded, and stay fp32. Either way every
weight decodes to the same bits.
"""

import json
import re
from typing import Any, NamedTuple

import torch

from .shards import Shards

Tensor = torch.Tensor

STATISTIC = re.compile(
    r"(?P<weight>.+)\.(?P<name>absmax|quant_map|nested_absmax|nested_quant_map|quant_state)(?P<type>\.bitsandbytes__\w+)?"
)
NESTED = ("nested_blocksize", "nested_dtype", "nested_offset")


class FourBit(NamedTuple):
    """A packed tensor's statistics.

    Args:
        keys: of the tensors absmax, quant_map, nested_absmax, nested_quant_map and quant_state.
        state: what the tensor quant_state says, JSON as bytes.
        codes: the values that the codes of weights, (16,), and of nested scales, (256,), stand for.
    """

    keys: dict[str, str]
    state: dict[str, Any]
    codes: list[Tensor]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.state["shape"])

    @property
    def nested(self) -> bool:
        return "nested_absmax" in self.keys

    def absmax(self, shards: Shards, part: int, parts: int) -> Tensor:
        """(blocks,) fp32: the scales of one of equal parts, decoded as bitsandbytes does, each step rounded."""
        values = shards.read(self.keys["absmax"], part, parts)
        if not self.nested:
            return values.float()
        first = part * len(values)
        groups = (first + torch.arange(len(values))) // self.state["nested_blocksize"]
        scales = shards.read(self.keys["nested_absmax"]).float()
        return self.codes[1][values.int()] * scales[groups] + torch.tensor(
            self.state["nested_offset"], dtype=torch.float32
        )


def read_four_bit(shards: Shards, weight: str, keys: dict[str, str]) -> FourBit:
    """Raises ValueError if something is missing or of another size than the weight's."""
    nested = ("nested_absmax", "nested_quant_map") if "nested_absmax" in keys else ()
    for name in ("absmax", "quant_map", "quant_state", *nested):
        if name not in keys:
            raise ValueError(f"{weight} is in 4 bit, but its {name} is missing")
    if weight not in shards.stored:
        raise ValueError(f"{keys['absmax']} is there, but {weight} is missing")
    try:
        state = json.loads(bytes(shards.read(keys["quant_state"]).tolist()))
        shape, blocksize = state["shape"], state["blocksize"]
        numel = int(torch.Size(shape).numel())
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{keys['quant_state']} is no quantization state of bitsandbytes: {error!r}") from error
    for name, key, length in (
        ("packed", weight, (numel + 1) // 2),
        ("absmax", keys["absmax"], -(-numel // blocksize) * (1 if nested else 4)),
    ):
        found = shards.stored[key].end - shards.stored[key].begin
        if found != length:
            raise ValueError(f"{key} must have {length} bytes, {name} of {shape} in blocks of {blocksize}, got {found}")
    return FourBit(keys, state, [shards.read(keys[name]) for name in ("quant_map", *nested[1:])])


def _same_nesting(one: FourBit, other: FourBit) -> bool:
    return (
        one.nested
        and other.nested
        and all(one.state.get(name) == other.state.get(name) for name in NESTED)
        and torch.equal(one.codes[1], other.codes[1])
    )


def joint_state(key: str, shape: tuple[int, ...], parts: list[tuple[FourBit, int]], matrices: int) -> dict[str, Any]:
    """The state of a tensor that consists of matrices from other tensors.

    Args:
        parts: each tensor with the number of matrices in it.
        matrices: how many are in the new one.

    Returns:
        With the fields of ``NESTED`` if the scales can stay quantized.

    Raises:
        ValueError: blocks lie across matrices, or the tensors are quantized in different ways.
    """
    first = parts[0][0]
    for name in ("quant_type", "blocksize", "dtype"):
        if len(kinds := {four_bit.state[name] for four_bit, _ in parts}) > 1:
            raise ValueError(f"{key}: all experts must have one {name}, got {sorted(map(str, kinds))}")
    if not all(torch.equal(four_bit.codes[0], first.codes[0]) for four_bit, _ in parts):
        raise ValueError(f"{key}: all experts must have one quant_map")
    numel = torch.Size(shape).numel() // matrices
    alone = matrices == 1 and all(count == 1 for _, count in parts)
    if not alone and numel % first.state["blocksize"]:
        raise ValueError(
            f"{key}: a matrix of {numel} values is not whole blocks of {first.state['blocksize']}, so that its scales "
            "cannot be told from the next one's"
        )
    state = {**first.state, "shape": list(shape)}
    nested = all(_same_nesting(four_bit, first) for four_bit, _ in parts)
    if nested and (alone or numel // first.state["blocksize"] % first.state["nested_blocksize"] == 0):
        return state
    return {name: value for name, value in state.items() if name not in NESTED}
