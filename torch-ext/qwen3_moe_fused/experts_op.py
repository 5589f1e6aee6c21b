"""The experts layer as two torch ops, for whoever looks at ops: torch.compile, dispatch modes, torch.func.

Ops take plain tensors and numbers and return tensors, so each projection comes flat, in eleven arguments; see
``Projection.flatten``.
"""

from typing import Tuple

import torch

from ._ops import add_op_namespace_prefix
from .backends import BACKWARD, FORWARD
from .projection import FLAT, Gradients, Projection, empty_gradients, unflatten
from .routed import new_sorted, sorted_part

Tensor = torch.Tensor

RESULTS = 5  # out, pre_activation, two low_rank, routed


_PROJECTION = (
    "Tensor {0}_proj, Tensor? {0}_absmax, Tensor? {0}_code, Tensor? {0}_nested_absmax, Tensor? {0}_nested_code, "
    "Tensor? {0}_nested_offset, int[] {0}_numbers, Tensor? {0}_A, Tensor? {0}_B, float {0}_scaling, float {0}_dropout"
)
_LAYER = (
    "Tensor hidden_states, Tensor top_k_index, Tensor top_k_weights, "
    f"{_PROJECTION.format('gate_up')}, {_PROJECTION.format('down')}, Tensor? seed, str activation"
)
_SAVED = "Tensor pre_activation, Tensor low_rank_gate_up, Tensor low_rank_down, Tensor routed"


def _op(name: str, arguments: str, results: int):
    """Decorates the function that computes an op on a GPU; its results are tensors."""
    schema = f"({arguments}) -> ({', '.join(['Tensor'] * results)})"
    return torch.library.custom_op(add_op_namespace_prefix(name), mutates_args=(), device_types="cuda", schema=schema)


@_op("fused_experts", f"{_LAYER}, bool save", results=RESULTS)
def forward_op(*inputs):
    return _run_forward("cuda", *inputs)


@_op("fused_experts_backward", f"Tensor grad_output, {_LAYER}, {_SAVED}, bool[] wanted", results=len(Gradients._fields))
def backward_op(*inputs):
    return _run_backward("cuda", *inputs)


def _run_forward(device: str, hidden_states, top_k_index, top_k_weights, *rest) -> Tuple[Tensor, ...]:
    """The op. Its results are tensors whose sizes follow from its arguments alone: of ``routed`` it leaves out the tile
    table, and an empty tensor stands for what there is not."""
    projections, (seed, activation, save) = _projections(rest, hidden_states.dtype)
    results = FORWARD[device](hidden_states, top_k_index, top_k_weights, *projections, seed, activation, save)
    *others, routed = [hidden_states.new_empty(0) if x is None else x for x in results]
    if save:
        routed = sorted_part(routed, top_k_index.numel(), projections[0].weight.shape[0])
    return *others, routed


def _run_backward(device: str, grad_output, hidden_states, top_k_index, top_k_weights, *rest) -> Tuple[Tensor, ...]:
    """The op of backward, likewise."""
    projections, (seed, activation, *saved, wanted) = _projections(rest, hidden_states.dtype)
    tokens = (grad_output, hidden_states, top_k_index, top_k_weights)
    grads = BACKWARD[device](*tokens, *projections, seed, tuple(saved), activation, Gradients(*wanted))
    return tuple(hidden_states.new_empty(0) if grad is None else grad for grad in grads)


def _projections(flat: Tuple, dtype: torch.dtype) -> Tuple[Tuple[Projection, Projection], Tuple]:
    """gate_up and down, and what stands behind them."""
    gate_up, down, rest = flat[:FLAT], flat[FLAT : 2 * FLAT], flat[2 * FLAT :]
    return (unflatten(gate_up, dtype), unflatten(down, dtype)), rest


forward_op.register_kernel("cpu")(lambda *inputs: _run_forward("cpu", *inputs))
backward_op.register_kernel("cpu")(lambda *inputs: _run_backward("cpu", *inputs))


@forward_op.register_fake
def _(hidden_states, top_k_index, top_k_weights, *rest):
    (gate_up, down), (_, _, save) = _projections(rest, hidden_states.dtype)
    slots = top_k_index.numel()
    widths = gate_up.weight.shape[1], gate_up.low_rank_width, down.low_rank_width
    return (
        hidden_states.new_empty(hidden_states.shape),
        *(hidden_states.new_empty((slots, width) if save and width else 0) for width in widths),
        new_sorted(top_k_index, gate_up.weight.shape[0]) if save else hidden_states.new_empty(0),
    )


@backward_op.register_fake
def _(grad_output, hidden_states, top_k_index, top_k_weights, *rest):
    projections, (*_, wanted) = _projections(rest, hidden_states.dtype)
    return tuple(empty_gradients(hidden_states, top_k_weights, *projections, Gradients(*wanted)))


DIFFERENTIABLE = {"hidden_states": 0, "top_k_weights": 2, "gate_up_proj": 3, "down_proj": 3 + FLAT}
DIFFERENTIABLE |= {"gate_up_A": 10, "gate_up_B": 11, "down_A": 10 + FLAT, "down_B": 11 + FLAT}
"""Where in the op's arguments each input stands that can have a gradient."""


def _setup_context(ctx, inputs, output):
    _, *saved = output
    inputs = inputs[:-1]
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs), *saved)


def _op_gradients(ctx, grad_output, *_) -> Tuple:
    grads = [None] * len(ctx.needs_input_grad)
    if grad_output is not None:
        tensors = ctx.saved_tensors
        inputs = [tensor if other is None else other for tensor, other in zip(tensors, ctx.others)]
        wanted = [ctx.needs_input_grad[at] for at in DIFFERENTIABLE.values()]
        computed = backward_op(grad_output, *inputs, *tensors[len(inputs) :], wanted)
        for at, asked, grad in zip(DIFFERENTIABLE.values(), wanted, computed):
            grads[at] = grad if asked else None
    return tuple(grads)


forward_op.register_autograd(_op_gradients, setup_context=_setup_context)
