"""PEFT's layout for ``target_parameters``: two dimensions for the factors of all experts, wrappers within wrappers.

    {block}.experts.base_layer.lora_A.weight (r*E, H), .lora_B.weight (2I, r*E)    gate_up_proj
    {block}.experts.lora_A.weight (r*E, I), .lora_B.weight (H, r*E)                down_proj

lora_A has the ranks of an expert together, lora_B the experts of a rank. PEFT wraps gate_up_proj first, so down_proj is
outside; when one of the two alone is adapted it is outside, whichever it is. PEFT up to 0.18 took the weights for
transposed ones: there A has the width of the output, B the height of the input, and each is the other's transpose.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, Optional

import torch

from . import gate_up
from .factors import Factors
from .layout import Experts, Layout, Projections, base_name, factors_of, key_pattern, pair_up
from .lora_config import Target, rank_of

Tensor = torch.Tensor

FIRST_UNSWAPPED_VERSION = "0.19.0"
PARAMETERS = ("gate_up_proj", "down_proj")

_KEY = key_pattern(r"experts(?P<inside>(\.base_layer)*)")
_COLUMNS_OF_GATE = "{}.experts.gate_up_proj.columns_of_gate"
_NAMES_OF_V4 = re.compile(r".*\.(gate|gate_proj|up_proj|down_proj)")
"""PEFT takes these among ``target_modules`` for names of experts in Transformers v4, wherever the module may be."""


class TargetParameters(Layout):
    def owns(self, key: str, tensor: Tensor) -> bool:
        return _KEY.fullmatch(key) is not None

    def read(self, tensors: dict[str, Tensor], config: dict[str, Any], metadata: dict[str, str]) -> Experts:
        matches = {key: match for key in tensors if (match := _KEY.fullmatch(key))}
        depth = {match["block"]: 0 for match in matches.values()}
        for match in matches.values():
            depth[match["block"]] = max(depth[match["block"]], match["inside"].count("."))
        stacks = {
            (match["block"], _parameter(match, depth[match["block"]], config), match["side"]): tensors[key]
            for key, match in matches.items()
        }
        pairs = defaultdict(dict)
        for block, parameter, A, B in pair_up(stacks):
            pairs[block][parameter] = _unfold(f"{base_name(block)}.experts.{parameter}", A, B, config)
        hidden = _hidden_size(tensors)
        experts = {}
        for block, stacked in pairs.items():
            if _swapped(block, stacked, hidden, config):
                stacked = {parameter: (B.mT, A.mT) for parameter, (A, B) in stacked.items()}
            experts[block] = _apart(
                {
                    parameter: factors_of(f"{base_name(block)}.experts.{parameter}", A, B, config)
                    for parameter, (A, B) in stacked.items()
                },
                metadata.get(_COLUMNS_OF_GATE.format(block)),
            )
        return experts

    def metadata(self, experts: Experts) -> dict[str, str]:
        return {
            _COLUMNS_OF_GATE.format(block): gate_up.record(projections.get("gate_proj"), projections.get("up_proj"))
            for block, projections in experts.items()
            if "gate_proj" in projections or "up_proj" in projections
        }

    def arrange(self, projections: Projections) -> Projections:
        gate, up, down = (projections.get(name) for name in ("gate_proj", "up_proj", "down_proj"))
        both = None if gate is None and up is None else gate_up.join(gate, up)
        return {name: factors for name, factors in zip(PARAMETERS, (both, down)) if factors is not None}

    def write(self, experts: Experts) -> dict[str, Tensor]:
        tensors = {}
        for block, parameters in experts.items():
            for parameter, factors in parameters.items():
                inside = ".base_layer" if parameter == "gate_up_proj" and "down_proj" in parameters else ""
                prefix = f"{block}.experts{inside}"
                tensors[f"{prefix}.lora_A.weight"] = factors.A.flatten(0, 1)
                tensors[f"{prefix}.lora_B.weight"] = factors.B.permute(1, 2, 0).flatten(1, 2)
        return tensors

    def targets(self, block: str, projection: str, factors: Factors) -> Iterator[Target]:
        yield Target(f"{base_name(block)}.experts.{projection}", factors, is_parameter=True)

    def linear_target(self, module: str, factors: Factors) -> Target:
        """The router and dense MLPs are targeted as parameters too; the keys of a matrix are a linear layer's."""
        if _NAMES_OF_V4.fullmatch(module):
            return Target(f"{base_name(module)}.weight", factors, is_parameter=True)
        return super().linear_target(module, factors)


def _parameter(match: re.Match, depth: int, config: dict[str, Any]) -> str:
    """The parameter whose wrapper a key is of."""
    inside = match["inside"].count(".")
    if depth == 1:
        return PARAMETERS[0] if inside else PARAMETERS[1]
    names = config.get("target_parameters") or []
    experts = f"{base_name(match['block'])}.experts"
    named = [p for p in PARAMETERS if any(f".{experts}.{p}".endswith(f".{name}") for name in names)]
    if depth > 1 or len(named) != 1:
        raise ValueError(
            f"{experts} has {depth + 1} wrapped parameter(s), which must be gate_up_proj or down_proj; "
            f"target_parameters in adapter_config.json names {names}, of which {named} here"
        )
    return named[0]


def _unfold(target: str, A: Tensor, B: Tensor, config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(E, r, in) and (E, out, r)."""
    rank = rank_of(config, target)
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1] or A.shape[0] % rank:
        raise ValueError(
            f"{target}: lora_A must be (r*E, in) and lora_B (out, r*E) with the rank {rank} that adapter_config.json "
            f"gives, got {tuple(A.shape)} and {tuple(B.shape)}"
        )
    return A.unflatten(0, (-1, rank)), B.unflatten(1, (rank, -1)).permute(2, 0, 1)


def _apart(parameters: Projections, columns_of_gate: Optional[str]) -> Projections:
    projections = {}
    if both := parameters.get("gate_up_proj"):
        if both.B.shape[1] % 2:
            raise ValueError(f"lora_B of gate_up_proj must have an even number of rows, got {tuple(both.B.shape)}")
        projections["gate_proj"], projections["up_proj"] = gate_up.split(both, columns_of_gate)
    projections["down_proj"] = parameters.get("down_proj")
    return {name: factors for name, factors in projections.items() if factors is not None}


def _hidden_size(tensors: dict[str, Tensor]) -> Optional[int]:
    """The model's hidden size as the adapter's attention or router has it."""
    for key, tensor in tensors.items():
        if re.search(r"\.([qkv]_proj|mlp\.gate)\.lora_A\.weight$", key):
            return tensor.shape[1]
        if key.endswith(".o_proj.lora_B.weight"):
            return tensor.shape[0]
    return None


def _swapped(block: str, stacked: dict[str, tuple], hidden: Optional[int], config: dict[str, Any]) -> bool:
    """Whether a PEFT up to 0.18 has written the factors: by their sizes, and where these allow both, by its version."""
    sizes = {parameter: (A.shape[2], B.shape[1]) for parameter, (A, B) in stacked.items()}
    fits = [swapped for swapped in (False, True) if _fits(sizes, None, swapped)]
    if len(fits) == 2 and hidden is not None:
        fits = [swapped for swapped in fits if _fits(sizes, hidden, swapped)]
    if not fits:
        raise ValueError(
            f"{block}.experts: factors must be (H, 2I) for gate_up_proj and (I, H) for down_proj, in and out, "
            f"got {sizes} beside a hidden size H of {hidden}"
        )
    if len(fits) == 1:
        return fits[0]
    version = re.match(r"(\d+)\.(\d+)", config.get("peft_version") or "")
    if version is None:
        raise ValueError(
            f"{block}.experts: PEFT up to 0.18 swaps the sizes of factors, and {sizes} could be of either kind; say in "
            f'adapter_config.json which "peft_version" wrote the adapter'
        )
    return (int(version[1]), int(version[2])) < tuple(map(int, FIRST_UNSWAPPED_VERSION.split(".")[:2]))


def _fits(sizes: dict[str, tuple[int, int]], hidden: Optional[int], swapped: bool) -> bool:
    H, I = {hidden} - {None}, set()
    for parameter, (width, height) in sizes.items():
        width, height = (height, width) if swapped else (width, height)
        H.add(width if parameter == "gate_up_proj" else height)
        I.add(height / 2 if parameter == "gate_up_proj" else width)
    return len(H) == len(I) == 1
