"""One grouped linear layer: every row times the matrix of its own expert.

    output[b, o] = sum_i weight[e(b), o, i] * input[b, i]

Rows are sorted by expert, ``m_sizes[e]`` of them each. The gradient of ``input`` is the same product with the
weight transposed, and the gradient of ``weight`` is a reduction over each expert's rows; the two ops are each
other's derivatives, so gradients of any order exist.
"""

import torch

from . import reference
from ._ops import add_op_namespace_prefix
from .checks import check_device, check_dims, check_float, check_integer, check_like, check_size


def moe_fused_linear(input: torch.Tensor, weight: torch.Tensor, m_sizes: torch.Tensor) -> torch.Tensor:
    """A linear layer a row's expert chooses: ``output[b, o] = sum_i weight[e(b), o, i] * input[b, i]``.

    Differentiable in ``input`` and ``weight``. Sums are accumulated in fp32; fp32 inputs are multiplied in IEEE
    fp32, not in TF32.

    Args:
        input: (M, K) bf16, fp16 or fp32, any strides, rows sorted by expert. On a GPU it is copied where columns lie
            so far apart that a tile of them spans 2^31 elements, as in a transposed one of 33 million rows.
        weight: (E, N, K), dtype and device of ``input``, any strides; copied likewise.
        m_sizes: (E,) int32 or int64, rows of each expert; the sum is M.

    Returns:
        (M, N), contiguous, dtype of ``input``.

    Raises:
        TypeError, ValueError: a wrong shape, dtype or device; on a CPU also an ``m_sizes`` that is negative or does
            not sum to M. A GPU cannot check that without making the host wait: there, rows behind the last expert
            come out zero, and rows past M are left out.
    """
    check_dims("input", input, "(M, K)")
    check_dims("weight", weight, "(E, N, K)")
    check_dims("m_sizes", m_sizes, "(E,)")
    check_float("input", input)
    check_device("input", input)
    check_like("weight", weight, "input", input)
    check_size("weight", weight, 2, input.shape[1], "K of input")
    check_integer("m_sizes", m_sizes)
    check_like("m_sizes", m_sizes, "input", input, dtype=False)
    check_size("m_sizes", m_sizes, 0, weight.shape[0], "E of weight")
    return _linear(input, weight, m_sizes)


@torch.library.custom_op(add_op_namespace_prefix("moe_fused_linear"), mutates_args=(), device_types="cuda")
def _linear(input: torch.Tensor, weight: torch.Tensor, m_sizes: torch.Tensor) -> torch.Tensor:
    from .kernels.linear import linear as launch  # Triton is imported only where it can run

    with torch.cuda.device(input.device):
        return launch(input, weight, m_sizes)


@torch.library.custom_op(add_op_namespace_prefix("moe_fused_linear_weight_grad"), mutates_args=(), device_types="cuda")
def _weight_grad(grad_output: torch.Tensor, input: torch.Tensor, m_sizes: torch.Tensor) -> torch.Tensor:
    from .kernels.weight_grad import weight_grad as launch

    with torch.cuda.device(input.device):
        return launch(grad_output, input, m_sizes)


_linear.register_kernel("cpu")(reference.linear)
_weight_grad.register_kernel("cpu")(reference.weight_grad)


@_linear.register_fake
def _(input, weight, m_sizes):
    return input.new_empty(input.shape[0], weight.shape[1])


@_weight_grad.register_fake
def _(grad_output, input, m_sizes):
    return input.new_empty(m_sizes.shape[0], grad_output.shape[1], input.shape[1])


def _save_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _linear_backward(ctx, grad_output):
    input, weight, m_sizes = ctx.saved_tensors
    grad_input = _linear(grad_output, weight.transpose(1, 2), m_sizes) if ctx.needs_input_grad[0] else None
    grad_weight = _weight_grad(grad_output, input, m_sizes) if ctx.needs_input_grad[1] else None
    return grad_input, grad_weight, None


def _weight_grad_backward(ctx, grad):
    grad_output, input, m_sizes = ctx.saved_tensors
    grad_grad_output = _linear(input, grad, m_sizes) if ctx.needs_input_grad[0] else None
    grad_input = _linear(grad_output, grad.transpose(1, 2), m_sizes) if ctx.needs_input_grad[1] else None
    return grad_grad_output, grad_input, None


_linear.register_autograd(_linear_backward, setup_context=_save_inputs)
_weight_grad.register_autograd(_weight_grad_backward, setup_context=_save_inputs)
