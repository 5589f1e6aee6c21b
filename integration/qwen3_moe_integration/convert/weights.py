"""Which expert's matrix lies where: the three layouts of a checkpoint's expert weights.

    per-expert   {block}.experts.{e}.{gate,up,down}_proj.weight  (N, K)              Transformers v4, and on the Hub
    stacked      {block}.experts.gate_up_proj (E, 2I, H), .experts.down_proj (E, H, I)   Transformers v5 in memory
    fused-2025   {block}.{gate,up,down}_proj.weight  (E, N, K)                       the 2025 project qwen3_moe_fused

All are row-major, so a tensor of any layout is its experts' matrices one after the other; gate_up_proj has gate and up
of an expert in turn. To convert is to write the same matrices in another order, whatever a matrix's bytes mean.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple, Optional

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

_PATTERNS = {
    "per-expert": r"(?P<block>.+)\.experts\.(?P<expert>\d+)\.(?P<name>gate_proj|up_proj|down_proj)\.weight",
    "stacked": r"(?P<block>.+)\.experts\.(?P<name>gate_up_proj|down_proj)",
    "fused-2025": r"(?P<block>.+)\.(?P<name>gate_proj|up_proj|down_proj)\.weight",
}
WEIGHT_LAYOUTS = tuple(_PATTERNS)


class Matrix(NamedTuple):
    """One projection of one expert, of the block that has the experts."""

    block: str
    projection: str
    expert: int


class Weight(NamedTuple):
    """A tensor of a layout and the matrices that it consists of, in order."""

    key: str
    shape: tuple[int, ...]
    matrices: list[Matrix]


def parse(layout: str, key: str, shape: tuple[int, ...]) -> Optional[Weight]:
    """What a tensor of a checkpoint is, None if it is of no expert in this layout."""
    match = re.fullmatch(_PATTERNS[layout], key)
    if match is None or len(shape) != (2 if layout == "per-expert" else 3):
        return None
    block, name = match["block"], match["name"]
    if layout == "per-expert":
        return Weight(key, shape, [Matrix(block, name, int(match["expert"]))])
    if name == "gate_up_proj" and shape[1] % 2:
        raise ValueError(f"{key} must have an even number of rows, gate's and up's, got {shape}")
    return Weight(key, shape, _stack(block, name, shape[0]))


def weights(layout: str, block: str, count: int, H: int, I: int) -> Iterator[Weight]:
    """The tensors of a block with ``count`` experts."""
    if layout == "per-expert":
        for e in range(count):
            for name in PROJECTIONS:
                shape = (H, I) if name == "down_proj" else (I, H)
                yield Weight(f"{block}.experts.{e}.{name}.weight", shape, [Matrix(block, name, e)])
    elif layout == "stacked":
        yield Weight(f"{block}.experts.gate_up_proj", (count, 2 * I, H), _stack(block, "gate_up_proj", count))
        yield Weight(f"{block}.experts.down_proj", (count, H, I), _stack(block, "down_proj", count))
    else:
        for name in PROJECTIONS:
            shape = (count, H, I) if name == "down_proj" else (count, I, H)
            yield Weight(f"{block}.{name}.weight", shape, _stack(block, name, count))


def _stack(block: str, name: str, count: int) -> list[Matrix]:
    names = ("gate_proj", "up_proj") if name == "gate_up_proj" else (name,)
    return [Matrix(block, projection, e) for e in range(count) for projection in names]
