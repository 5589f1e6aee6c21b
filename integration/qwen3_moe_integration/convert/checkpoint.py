"""A checkpoint's expert weights, matrix by matrix, whatever layout they are in and whether in 4 bit or not."""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .folder import read_json
from .four_bit import STATISTIC, FourBit, read_four_bit
from .shards import Shards
from .weights import PROJECTIONS, WEIGHT_LAYOUTS, Matrix, Weight, parse

Tensor = torch.Tensor

CONFIG = "config.json"
_LAYER = re.compile(r"(?P<owner>.*\b)layers\.(?P<index>\d+)\.")


class Place(NamedTuple):
    """A matrix is the ``part``-th of ``parts`` equal parts of the tensor ``key``."""

    key: str
    part: int
    parts: int


class Checkpoint:
    """A checkpoint in one of ``WEIGHT_LAYOUTS``.

    Attributes:
        places: where each expert's matrix is.
        others: the keys of everything that is no expert's.
        four_bit: of each tensor of experts that is in 4 bit, by its key, what bitsandbytes saved beside it.
        blocks: names of the modules that have experts, in the order of layers.
        sizes: (E, H, I)
        config: what config.json has, nothing if there is none.

    Raises:
        FileNotFoundError, ValueError: as :class:`Shards` does, or experts are missing or of different sizes, or
            quantized in another way, or not as many as config.json says.
    """

    def __init__(self, folder: Path):
        self.shards = Shards(folder)
        beside = defaultdict(dict)
        for key in self.shards.stored:
            if match := STATISTIC.fullmatch(key):
                beside[match["weight"]][match["name"]] = key
        four_bit = {key: read_four_bit(self.shards, key, names) for key, names in beside.items()}
        shapes = {
            key: four_bit[key].shape if key in four_bit else stored.shape for key, stored in self.shards.stored.items()
        }
        self.layout = _layout_of(shapes)
        weights = [weight for key, shape in shapes.items() if (weight := parse(self.layout, key, shape))]
        self.places = {
            matrix: Place(weight.key, part, len(weight.matrices))
            for weight in weights
            for part, matrix in enumerate(weight.matrices)
        }
        self.four_bit: dict[str, FourBit] = {w.key: four_bit[w.key] for w in weights if w.key in four_bit}
        mine = {key for weight in weights for key in (weight.key, *beside.get(weight.key, {}).values())}
        self.others = [key for key in self.shards.stored if key not in mine]
        for key in self.others:
            if re.search(r"\.experts\.", key):
                raise ValueError(f"{key} is neither an expert's weight nor a 4-bit statistic of bitsandbytes")
        self.blocks = sorted({matrix.block for matrix in self.places}, key=_natural)
        self.sizes = self._sizes(weights)
        self.config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
        for config in (self.config, self.config.get("text_config")):
            self._compare_with(config if isinstance(config, dict) else {})

    def _sizes(self, weights: list[Weight]) -> tuple[int, int, int]:
        count = 1 + max(matrix.expert for matrix in self.places)
        for block in self.blocks:
            for projection in PROJECTIONS:
                wanted = [Matrix(block, projection, e) for e in range(count)]
                if missing := [matrix.expert for matrix in wanted if matrix not in self.places]:
                    raise ValueError(
                        f"{block}: the checkpoint has {count} experts, but {projection} of {missing} is missing here"
                    )
        seen = {}
        for weight in weights:
            projection = weight.matrices[0].projection
            N, K = weight.shape[-2:]
            if len({matrix.projection for matrix in weight.matrices}) == 2:
                N //= 2
            first, expected = seen.setdefault("H, I", (weight.key, (N, K) if projection == "down_proj" else (K, N)))
            if ((N, K) if projection == "down_proj" else (K, N)) != expected:
                raise ValueError(f"{weight.key} is {weight.shape}, which does not fit {first} with H, I = {expected}")
        return (count, *expected)

    def _compare_with(self, config: dict[str, Any]) -> None:
        for name in ("num_experts", "num_local_experts"):
            if config.get(name) not in (None, self.sizes[0]):
                raise ValueError(f"{CONFIG} has {name} {config[name]}, but the checkpoint has {self.sizes[0]} experts")
        # Beside its own layers a model may have others, for multi-token prediction or vision, in the same list or not.
        layers = defaultdict(set)
        for key in self.shards.stored:
            if match := _LAYER.match(key):
                layers[match["owner"]].add(int(match["index"]))
        owners = {match["owner"] for block in self.blocks if (match := _LAYER.match(f"{block}."))}
        found = max((layers[owner] for owner in owners), key=len, default=set())
        count = config.get("num_hidden_layers")
        if isinstance(count, int) and (missing := sorted(set(range(count)) - found)):
            raise ValueError(
                f"{CONFIG} has num_hidden_layers {count}, but of layers {missing} the checkpoint has nothing"
            )

    def values(self, matrix: Matrix) -> Tensor:
        """(N*K,) of a dense matrix, finite; the packed bytes of one in 4 bit."""
        place = self.places[matrix]
        values = self.shards.read(*place)
        check_finite(place.key, values)
        return values

    def absmax(self, matrix: Matrix) -> Tensor:
        """(blocks,) fp32 of a matrix in 4 bit."""
        place = self.places[matrix]
        return self.four_bit[place.key].absmax(self.shards, place.part, place.parts)


def check_finite(key: str, values: Tensor) -> None:
    # The smallest and largest value are enough, since NaN is both.
    if values.is_floating_point() and len(values) and not torch.stack(values.aminmax()).isfinite().all():
        raise ValueError(f"{key} has values that are not finite")


def _layout_of(shapes: dict[str, tuple[int, ...]]) -> str:
    found = [layout for layout in WEIGHT_LAYOUTS if any(parse(layout, *item) for item in shapes.items())]
    if len(found) != 1:
        raise ValueError(f"the experts must be in one of the layouts {[*WEIGHT_LAYOUTS]}, found {found or 'none'}")
    return found[0]


def _natural(name: str) -> list:
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]
