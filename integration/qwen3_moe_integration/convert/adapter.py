"""An adapter in memory, between the layout it was read from and the one it is written in."""

import re
from dataclasses import dataclass
from typing import Any

import torch

from . import lora_config
from .factors import Factors
from .fused_2025 import Fused2025
from .layout import Experts, Layout, check_sizes, factors_of
from .lora_config import Target
from .per_expert import PerExpert
from .target_parameters import FIRST_UNSWAPPED_VERSION, TargetParameters

Tensor = torch.Tensor

LAYOUTS: dict[str, Layout] = {"per-expert": PerExpert(), "peft": TargetParameters(), "fused-2025": Fused2025()}

_LINEAR_A = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?A(?P<weight>\.weight)?")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter of a Mixture-of-Experts model.

    Args:
        config: ``adapter_config.json``, as it was read.
        experts: the factors of the experts, of every block.
        linears: the factors of every other adapted layer, by the key of its A.
        rest: everything else, such as layers that were trained as a whole; passed on as it is.
    """

    config: dict[str, Any]
    experts: Experts
    linears: dict[str, Factors]
    rest: dict[str, Tensor]


def layout_of(tensors: dict[str, Tensor]) -> str:
    """Which layout an adapter's expert LoRA is in."""
    found = [name for name, layout in LAYOUTS.items() if any(layout.owns(*item) for item in tensors.items())]
    if len(found) != 1:
        raise ValueError(
            f"the adapter must have expert LoRA in one of the layouts {[*LAYOUTS]}, found {found or 'none'}"
        )
    return found[0]


def unpack(tensors: dict[str, Tensor], config: dict[str, Any], metadata: dict[str, str]) -> Adapter:
    """The adapter that a file's tensors and metadata and its configuration are.

    Raises:
        ValueError: not plain LoRA, or incomplete, or not of one model; the message names the tensor.
    """
    lora_config.check(config)
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{key} has values that are not finite")
    layout = LAYOUTS[layout_of(tensors)]
    mine = {key for key, tensor in tensors.items() if layout.owns(key, tensor)}
    others = {key: tensor for key, tensor in tensors.items() if key not in mine}
    for key in others:
        if ".experts." in key:
            raise ValueError(f"{key} is no factor of plain LoRA on gate_proj, up_proj or down_proj of the experts")
    experts = layout.read(tensors, config, metadata)
    check_sizes(experts)
    linears = {}
    for key in others:
        if match := _LINEAR_A.fullmatch(key):
            A, B = others[key], others.get(_key_of_B(key))
            if B is None:
                raise ValueError(f"{match['module']} has a lora_A but no lora_B")
            target = layout.linear_target(match["module"], Factors(A, B, 1.0)).name
            linears[key] = factors_of(target, A, B, config)
    paired = {*linears, *map(_key_of_B, linears)}
    return Adapter(config, experts, linears, {key: others[key] for key in others if key not in paired})


def pack(adapter: Adapter, to: str, uniform: bool = False) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, str]]:
    """The tensors, the configuration and the file's metadata of ``adapter`` in the layout ``to``.

    Args:
        to: a key of ``LAYOUTS``.
        uniform: one rank for everything, filled up with zeros, and scaling 1, multiplied into B, so that ``r`` and
            ``lora_alpha`` alone say what the adapter is.
    """
    layout, config = LAYOUTS[to], dict(adapter.config)
    experts = {block: layout.arrange(projections) for block, projections in adapter.experts.items()}
    linears = adapter.linears
    if uniform:
        rank = max(factors.rank for factors in (*linears.values(), *(f for p in experts.values() for f in p.values())))
        experts = {
            block: {projection: factors.padded(rank).rescaled(1.0) for projection, factors in projections.items()}
            for block, projections in experts.items()
        }
        linears = {key: factors.padded(rank).rescaled(1.0) for key, factors in linears.items()}
        config["use_rslora"] = False
    targets = [
        target
        for block, projections in experts.items()
        for projection, factors in projections.items()
        for target in layout.targets(block, projection, factors)
    ]
    targets += [layout.linear_target(_LINEAR_A.fullmatch(key)["module"], factors) for key, factors in linears.items()]
    tensors = layout.write(experts)
    for key, factors in linears.items():
        tensors[key], tensors[_key_of_B(key)] = factors.A, factors.B
    tensors.update(adapter.rest)
    # Views of one storage, or of one tensor twice, cannot be saved.
    tensors = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
    return tensors, _describe(config, targets, to), layout.metadata(adapter.experts)


def _describe(config: dict[str, Any], targets: list[Target], to: str) -> dict[str, Any]:
    config = lora_config.describe(config, targets)
    if to != "peft":
        # Readers of the other layouts need not know the field, and some stop at one that they do not know.
        return {field: value for field, value in config.items() if field != "target_parameters"}
    # A parameter's addition cannot have dropout; PEFT would not load it. The version says which way A and B lie.
    return {**config, "lora_dropout": 0.0, "peft_version": FIRST_UNSWAPPED_VERSION}


def _key_of_B(key_of_A: str) -> str:
    match = _LINEAR_A.fullmatch(key_of_A)
    return f"{match['module']}.lora_{match['embedding'] or ''}B{match['weight'] or ''}"
