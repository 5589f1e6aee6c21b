"""Clipping gradients where each rank has those of its own experts: all ranks have to clip by the same norm."""

from collections.abc import Iterable
from functools import wraps

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from .exchange import gather

Tensor = torch.Tensor

_accelerators = Accelerator.clip_grad_norm_


def clip_grad_norm_(model: nn.Module, max_norm: float, norm_type: float = 2.0) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` for a model whose experts may be shared out: all ranks clip by the same norm.

    Args:
        model: the model that ``share_out_experts`` has changed, or what DDP made of it.
        max_norm: what the norm of all gradients, those of every rank's experts included, is to be at most.
        norm_type: which norm.

    Returns:
        That norm before, the same on all ranks.
    """
    parameters = list(model.parameters())
    clip = _clip if any(map(_is_marked, parameters)) else torch.nn.utils.clip_grad_norm_
    return clip(parameters, max_norm, norm_type)


def mark(parameter: nn.Parameter) -> None:
    """As one that other ranks have another of."""
    parameter.is_shared_out = True


def install() -> None:
    """Has Accelerate, and so the Trainer, clip as here where there are parameters that are marked."""
    Accelerator.clip_grad_norm_ = _accelerator_clip_grad_norm_


@wraps(_accelerators)
def _accelerator_clip_grad_norm_(
    self: Accelerator, parameters: Iterable[nn.Parameter], max_norm: float, norm_type: float = 2
) -> Tensor:
    parameters = list(parameters)
    if not any(map(_is_marked, parameters)):
        return _accelerators(self, parameters, max_norm, norm_type)
    self.unscale_gradients()
    return _clip(parameters, max_norm, norm_type)


def _clip(parameters: list[nn.Parameter], max_norm: float, norm_type: float) -> Tensor:
    device = parameters[0].device
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    own, others = (
        get_total_norm([each.grad for each in parameters if _is_marked(each) is marked], norm_type).float().to(device)
        for marked in (True, False)
    )
    total = torch.linalg.vector_norm(torch.cat([gather(own[None]), others[None]]), norm_type)
    clip_grads_with_norm_(parameters, max_norm, total)
    return total


def _is_marked(parameter: nn.Parameter) -> bool:
    return getattr(parameter, "is_shared_out", False)
