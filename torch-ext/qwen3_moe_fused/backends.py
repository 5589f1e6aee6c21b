"""What computes the experts layer on each kind of device: ``reference`` on a CPU, Triton kernels on a GPU."""

import functools
from typing import Callable, Tuple

import torch

from . import reference


@functools.cache
def _launchers() -> Tuple[Callable, Callable, Callable]:
    """Triton is imported only where it can run."""
    from .kernels.experts import experts_backward, experts_forward
    from .kernels.replay import replayed

    return replayed, experts_forward, experts_backward


def _launch_forward(hidden_states, *rest):
    replayed, forward, _ = _launchers()
    return _on_its_device(replayed, forward, hidden_states, *rest)


def _launch_backward(grad_output, *rest):
    replayed, _, backward = _launchers()
    return _on_its_device(replayed, backward, grad_output, *rest)


def _on_its_device(replayed, function, tensor, *rest):
    if tensor.get_device() == torch.cuda.current_device():
        return replayed(function, tensor, *rest)
    with torch.cuda.device(tensor.get_device()):
        return replayed(function, tensor, *rest)


FORWARD = {"cpu": reference.experts_forward, "cuda": _launch_forward}
BACKWARD = {"cpu": reference.experts_backward, "cuda": _launch_backward}
"""By kind of device, with the arguments and results of ``reference``."""
