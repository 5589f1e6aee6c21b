"""The whole experts layer, for x = hidden_states[t], e = top_k_index[t, j]:

    out[t] = sum_j top_k_weights[t, j] * down[e] @ (act(gate[e] @ x) * (up[e] @ x))

Forward, four launches:

    routing    top_k_index                  -> order, m_sizes, tiles
    gate_up    hidden_states rows, gathered -> pre_activation (S, 2I), kept only for backward; intermediate (S, I)
    down       intermediate                 -> one row a slot (S, H)
    combine    slots, top_k_weights         -> out (T, H), each token's k slots added in fp32 in a fixed order

Backward with frozen experts, four launches; trained experts add one reduction each:

    tile_table        m_sizes                    -> tiles, cheaper made again than kept
    down_backward     grad_output rows, gathered -> grad of pre_activation (S, 2I), parts of that of top_k_weights
    linear            grad of pre_activation     -> one row a slot (S, H)
    combine_backward  slots, parts               -> grad of hidden_states (T, H) and of top_k_weights (T, k)
    weight_grad       an expert's rows           -> grad of gate_up_proj, of down_proj

What backward keeps is hidden_states, pre_activation and the index tensors: the activation is cheaper to compute
again than to read back, and no gathered or k-times repeated copy of the tokens is ever kept.
"""

from typing import Tuple

import torch

from . import reference
from ._ops import add_op_namespace_prefix
from .checks import check_activation, check_device, check_dims, check_float, check_integer, check_like, check_size

Tensor = torch.Tensor


def fused_experts(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    activation: str = "silu",
) -> Tensor:
    """The experts of a Mixture-of-Experts layer, for tokens that a router has already sent to k experts each.

    Differentiable in ``hidden_states``, ``top_k_weights`` and, when they require it, the expert weights. Sums are
    accumulated in fp32; results are bit-identical from run to run. Under ``torch.autocast`` the floating inputs
    are cast to its dtype first.

    Args:
        hidden_states: (T, H) bf16, fp16 or fp32.
        top_k_index: (T, k) int32 or int64, the experts of each token, in [0, E]; E marks a slot to skip, which
            adds nothing and gets no gradient. On a GPU other values count as E, on a CPU they are an error.
        top_k_weights: (T, k) bf16, fp16 or fp32. A NaN reaches only its own token.
        gate_up_proj: (E, 2I, H), dtype of ``hidden_states``; rows [0, I) are the gate, [I, 2I) the up projection.
        down_proj: (E, H, I), dtype of ``hidden_states``.
        activation: "silu", "gelu" or "gelu_tanh", applied to the gate.

    Returns:
        (T, H), dtype of ``hidden_states``.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it wants.
    """
    check_dims("hidden_states", hidden_states, "(T, H)")
    if torch.is_autocast_enabled(hidden_states.device.type):
        dtype = torch.get_autocast_dtype(hidden_states.device.type)
        hidden_states, gate_up_proj, down_proj = (x.to(dtype) for x in (hidden_states, gate_up_proj, down_proj))
    _check(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, activation)
    inputs = hidden_states, top_k_weights, gate_up_proj, down_proj
    save = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    return _forward(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, activation, save)[0]


def _check(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, activation) -> None:
    check_dims("top_k_index", top_k_index, "(T, k)")
    check_dims("top_k_weights", top_k_weights, "(T, k)")
    check_dims("gate_up_proj", gate_up_proj, "(E, 2I, H)")
    check_dims("down_proj", down_proj, "(E, H, I)")
    check_float("hidden_states", hidden_states)
    check_float("top_k_weights", top_k_weights)
    check_integer("top_k_index", top_k_index)
    check_device("hidden_states", hidden_states)
    for name, tensor in (("top_k_index", top_k_index), ("top_k_weights", top_k_weights)):
        check_like(name, tensor, "hidden_states", hidden_states, dtype=False)
        check_size(name, tensor, 0, hidden_states.shape[0], "T of hidden_states")
    check_size("top_k_weights", top_k_weights, 1, top_k_index.shape[1], "k of top_k_index")
    for name, tensor in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj)):
        check_like(name, tensor, "hidden_states", hidden_states)
    check_size("gate_up_proj", gate_up_proj, 2, hidden_states.shape[1], "H of hidden_states")
    check_size("down_proj", down_proj, 0, gate_up_proj.shape[0], "E of gate_up_proj")
    check_size("down_proj", down_proj, 1, hidden_states.shape[1], "H of hidden_states")
    check_size("gate_up_proj", gate_up_proj, 1, 2 * down_proj.shape[2], "twice I of down_proj")
    check_activation(activation)


@torch.library.custom_op(add_op_namespace_prefix("fused_experts"), mutates_args=(), device_types="cuda")
def _forward(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    activation: str,
    save: bool,
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    from .kernels.experts import experts_forward as launch  # Triton is imported only where it can run

    with torch.cuda.device(hidden_states.device):
        return launch(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, activation, save)


@torch.library.custom_op(add_op_namespace_prefix("fused_experts_backward"), mutates_args=(), device_types="cuda")
def _backward(
    grad_output: Tensor,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    pre_activation: Tensor,
    order: Tensor,
    m_sizes: Tensor,
    activation: str,
    hidden_states_grad: bool,
    gate_up_proj_grad: bool,
    down_proj_grad: bool,
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    from .kernels.experts import experts_backward as launch

    with torch.cuda.device(hidden_states.device):
        return launch(
            grad_output, hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, pre_activation, order,
            m_sizes, activation, hidden_states_grad, gate_up_proj_grad, down_proj_grad,
        )  # fmt: skip


_forward.register_kernel("cpu")(reference.experts_forward)
_backward.register_kernel("cpu")(reference.experts_backward)


@_forward.register_fake
def _(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, activation, save):
    slots = top_k_index.numel()
    return (
        hidden_states.new_empty(hidden_states.shape),
        hidden_states.new_empty(slots if save else 0, gate_up_proj.shape[1]),
        top_k_index.new_empty(slots, dtype=torch.int32),
        top_k_index.new_empty(gate_up_proj.shape[0], dtype=torch.int32),
    )


@_backward.register_fake
def _(
    grad_output, hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, pre_activation, order,
    m_sizes, activation, hidden_states_grad, gate_up_proj_grad, down_proj_grad,
):  # fmt: skip
    def like(tensor, wanted=True):
        return tensor.new_empty(tensor.shape if wanted else 0)

    return (
        like(hidden_states, hidden_states_grad),
        like(top_k_weights),
        like(gate_up_proj, gate_up_proj_grad),
        like(down_proj, down_proj_grad),
    )


def _setup_context(ctx, inputs, output):
    *tensors, ctx.activation, _ = inputs
    _, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *saved)


def _autograd_backward(ctx, grad_output, *_):
    hidden, _, weights, gate_up, down, _, _ = ctx.needs_input_grad
    if grad_output is None:
        return (None,) * 7
    grads = _backward(grad_output, *ctx.saved_tensors, ctx.activation, hidden, gate_up, down)
    grad_hidden, grad_weights, grad_gate_up, grad_down = (
        grad if wanted else None for grad, wanted in zip(grads, (hidden, weights, gate_up, down))
    )
    return grad_hidden, None, grad_weights, grad_gate_up, grad_down, None, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
