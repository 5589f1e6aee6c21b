"""What computes the experts layer on each kind of device: ``reference`` on a CPU, Triton kernels on a GPU."""

import torch

from . import reference


def _launch_forward(hidden_states, *rest):
    from .kernels.experts import experts_forward  # Triton is imported only where it can run

    with torch.cuda.device(hidden_states.get_device()):
        return experts_forward(hidden_states, *rest)


def _launch_backward(grad_output, *rest):
    from .kernels.experts import experts_backward

    with torch.cuda.device(grad_output.get_device()):
        return experts_backward(grad_output, *rest)


FORWARD = {"cpu": reference.experts_forward, "cuda": _launch_forward}
BACKWARD = {"cpu": reference.experts_backward, "cuda": _launch_backward}
"""By kind of device, with the arguments and results of ``reference``."""
