"""What computes on each kind of device, ``reference`` on a CPU and Triton kernels on a GPU, and when to ask for that by
way of a torch op: PyTorch's dispatcher takes longer than the launches of a small batch."""

import functools
from typing import Callable, Optional, Sequence, Tuple

import torch

from . import reference
from .form import PLAIN
from .projection import FourBitWeight

Tensor = torch.Tensor


def op_is_seen(tensors: Sequence[Optional[Tensor]]) -> bool:
    """Whether there is someone who wants to see the op: torch.compile, a dispatch mode (which may trace, count or
    save by op), torch.func, or a kind of tensor (fake, distributed, on the meta device) that gives it another meaning.
    The first of ``tensors`` is one.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or not {*map(type, tensors)} <= _PLAIN_OR_NONE
        or tensors[0].is_meta
    )


_PLAIN_OR_NONE = {*PLAIN, type(None)}


@functools.cache
def _launchers() -> Tuple[Callable, Callable, Callable, Callable]:
    """Triton is imported only where it can run."""
    from .kernels.dequantize import dequantize
    from .kernels.experts import experts_backward, experts_forward
    from .kernels.replay import replayed

    return replayed, experts_forward, experts_backward, dequantize


def _launch_forward(hidden_states, *rest):
    replayed, forward, *_ = _launchers()
    return _on_its_device(hidden_states, replayed, forward, hidden_states, *rest)


def _launch_backward(grad_output, *rest):
    replayed, _, backward, _ = _launchers()
    return _on_its_device(grad_output, replayed, backward, grad_output, *rest)


def _launch_dequantize(weight: FourBitWeight, dtype: torch.dtype) -> Tensor:
    *_, dequantize = _launchers()
    return _on_its_device(weight.packed, dequantize, weight, dtype)


def _on_its_device(tensor, function, *arguments):
    if tensor.get_device() == torch.cuda.current_device():
        return function(*arguments)
    with torch.cuda.device(tensor.get_device()):
        return function(*arguments)


FORWARD = {"cpu": reference.experts_forward, "cuda": _launch_forward}
BACKWARD = {"cpu": reference.experts_backward, "cuda": _launch_backward}
"""By kind of device, with the arguments and results of ``reference``."""
DEQUANTIZE = {"cpu": reference.dequantize, "cuda": _launch_dequantize}
"""Likewise; see ``four_bit.dequantize``."""
