"""Calls without a mask, and without a question to the GPU.

Before its first layer, a model of Transformers looks at the positions of the tokens for rows that are several sequences
packed end to end, and the host waits for the answer. A call that gives neither positions nor a mask has one sequence a
row, so there is nothing to find. Here it is given an empty mask. Transformers passes it on, as every mask of four
dimensions, which somebody else has prepared; and the checkpointing that calls the layers calls them with none.
"""

from functools import partial
from typing import Any, Optional

import torch
from torch import nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeModel

Tensor = torch.Tensor

_EMPTY = torch.empty(0, 0, 0, 0, dtype=torch.bool)
_TELL_SEQUENCES_APART = "attention_mask", "position_ids", "past_key_values"


def leave_unmasked(model: nn.Module) -> None:
    """Has a Qwen3-MoE ask for nothing in calls without a mask, positions and a cache, while it trains with
    checkpointing that says ``drops_empty_masks``. They give what they gave before, as do all others. Other models,
    attention other than "sdpa", and sliding windows are left alone."""
    for module in model.modules():
        if isinstance(module, Qwen3MoeModel) and _give_empty_mask not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_give_empty_mask, with_kwargs=True)


def without_empty_mask(call: partial) -> partial:
    """A layer's call as it is without the question."""
    mask = call.keywords.get("attention_mask")
    is_empty = isinstance(mask, Tensor) and mask.numel() == 0
    return partial(call.func, *call.args, **call.keywords | {"attention_mask": None}) if is_empty else call


def _give_empty_mask(model: Qwen3MoeModel, args: tuple, kwargs: dict[str, Any]) -> Optional[tuple[tuple, dict]]:
    told = len(args) > 1 or any(kwargs.get(name) is not None for name in _TELL_SEQUENCES_APART)
    plain = model.config._attn_implementation == "sdpa" and model.config.sliding_window is None
    if told or not plain or not all(map(_drops_empty_masks, model.layers)):
        return None
    return args, kwargs | {"attention_mask": _EMPTY}


def _drops_empty_masks(layer: nn.Module) -> bool:
    checkpointed = layer.training and layer.gradient_checkpointing and layer._gradient_checkpointing_func
    return getattr(checkpointed, "drops_empty_masks", False)
