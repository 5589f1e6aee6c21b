"""The whole experts layer, for x = hidden_states[t], e = top_k_index[t, j]:

    out[t] = sum_j top_k_weights[t, j] * down[e] @ (act(gate[e] @ x) * (up[e] @ x))

Forward, four launches, or five with many slots, which routing counts first:

    routing    top_k_index                  -> order, m_sizes, tiles
    gate_up    hidden_states rows, gathered -> pre_activation (S, 2I), kept only for backward; intermediate (S, I)
    down       intermediate                 -> one row per slot (S, H)
    combine    slots, top_k_weights         -> out (T, H), each token's k slots added in fp32 in a fixed order

A row of H columns per slot would be the largest tensor of the layer. Of large batches, down computes half of the
columns, and combine adds them up before the others take their memory: two launches each. So do linear and
combine_backward below. No sum is over columns, so that changes no bit of the results.

Backward with frozen experts, three launches; trained experts add one reduction each:

    down_backward     grad_output rows, gathered -> grad of pre_activation (S, 2I), parts of that of top_k_weights
    linear            grad of pre_activation     -> one row per slot (S, H)
    combine_backward  slots, parts               -> grad of hidden_states (T, H) and of top_k_weights (T, k)
    weight_grad       an expert's rows           -> grad of gate_up_proj, of down_proj

What is kept for backward is hidden_states, pre_activation and the index tensors (tiles are made again where backward's
have another height): the activation is cheaper to compute again than to read back, and no gathered or k-times repeated
copy of the tokens is ever kept.

Either weight may be in 4 bit: it is decoded on its way into the product, and has no gradient. Either projection may
carry an adapter per expert, which adds three launches to it:

    low_rank      x                         -> scaling * x A^T (S, R), kept for backward; B is added in the projection
    low_rank      grad of its result        -> that of x A^T (S, R); A is added where that of x is computed
    factor_grads  an expert's rows          -> grad of A and B
"""

from typing import Any, Callable, Optional, Tuple

import torch

from .backends import BACKWARD, op_is_seen
from .checks import check_activation, check_device, check_dims, check_float, check_integer, check_like, check_size
from .experts_op import backward_op, forward_op
from .form import ByForm, form_of
from .kept import run_forward
from .projection import FourBitWeight, Gradients, Lora, Projection, Weight, check_lora, check_weight

Tensor = torch.Tensor


def fused_experts(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Weight,
    down_proj: Weight,
    activation: str = "silu",
    gate_up_lora: Optional[Lora] = None,
    down_lora: Optional[Lora] = None,
) -> Tensor:
    """The experts of a Mixture-of-Experts layer, for tokens that a router has already sent to k experts each.

    Differentiable in ``hidden_states``, ``top_k_weights`` and, when they require it, dense expert weights and
    adapters. Sums are accumulated in fp32; results are bit-identical from run to run. Under ``torch.autocast`` the
    tokens and dense weights are cast to its dtype first.

    Args:
        hidden_states: (T, H) bf16, fp16 or fp32.
        top_k_index: (T, k) int32 or int64, the experts of each token, in [0, E]; E marks a slot to skip, which
            adds nothing and gets no gradient. On a GPU other values count as E, on a CPU they are an error.
        top_k_weights: (T, k) bf16, fp16 or fp32. A NaN reaches only its own token.
        gate_up_proj: (E, 2I, H), dtype of ``hidden_states``; rows [0, I) are the gate, [I, 2I) the up projection.
            Or a :class:`FourBitWeight` of that shape, which is frozen.
        down_proj: (E, H, I), dtype of ``hidden_states``; or a :class:`FourBitWeight` of that shape.
        activation: "silu", "gelu" or "gelu_tanh", applied to the gate.
        gate_up_lora, down_lora: adapters to add to the projections, factors in any of the dtypes above. With dropout,
            which elements are dropped follows from PyTorch's random numbers on the device of ``hidden_states``.

    Returns:
        (T, H), dtype of ``hidden_states``. Any size but those of a 4-bit stack may be 0; a sum over nothing is zero.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it wants.
    """
    check_dims("hidden_states", hidden_states, "(T, H)")
    check_device("hidden_states", hidden_states)
    if not hidden_states.is_meta and torch.is_autocast_enabled(hidden_states.device.type):
        hidden_states, gate_up_proj, down_proj = _autocast(hidden_states, gate_up_proj, down_proj)
    tokens = (hidden_states, top_k_index, top_k_weights)
    gate_up, down = Projection.of(gate_up_proj, gate_up_lora), Projection.of(down_proj, down_lora)
    form = (form_of(*tokens), gate_up.form, down.form, activation)
    _once(None if None in form else form, _check, *tokens, gate_up, down, activation)
    seed = None
    if (gate_up.lora and gate_up.lora.dropout) or (down.lora and down.lora.dropout):
        seed = torch.randint(2**31, (1,), device=hidden_states.device)
    leaves = _leaves(hidden_states, top_k_weights, gate_up, down)
    save = torch.is_grad_enabled() and any([x is not None and x.requires_grad for x in leaves])
    if op_is_seen((*leaves, top_k_index)):
        return forward_op(*tokens, *gate_up.flatten(), *down.flatten(), seed, activation, save)[0]
    if save:
        return FusedExperts.apply(top_k_index, gate_up, down, seed, activation, *leaves)
    return run_forward(*tokens, gate_up, down, seed, activation, save=False)[0]


def _autocast(hidden_states: Tensor, gate_up_proj: Weight, down_proj: Weight) -> Tuple[Tensor, Weight, Weight]:
    """In the dtype of ``torch.autocast``, after a look at what casting would make pass, or cannot cast."""
    dtype = torch.get_autocast_dtype(hidden_states.device.type)
    _check_kinds(hidden_states, gate_up_proj, down_proj)
    weights = (("gate_up_proj", gate_up_proj), ("down_proj", down_proj))
    return hidden_states.to(dtype), *[_cast(name, weight, dtype) for name, weight in weights]


def _cast(name: str, weight: Weight, dtype: torch.dtype) -> Weight:
    if isinstance(weight, FourBitWeight):
        return weight
    check_float(name, weight)
    return weight.to(dtype)


_checked = ByForm()


def _once(form: Optional[Tuple], check: Callable[..., None], *arguments: Any) -> None:
    """``check(*arguments)``, unless arguments of the same form have passed it."""
    try:
        if form is not None and form in _checked:
            return
    except TypeError:  # cannot be hashed, as a list cannot: the check says whether that is a mistake
        form = None
    check(*arguments)
    if form is not None:
        _checked.keep(form, True)


def _check_kinds(hidden_states, gate_up_proj, down_proj) -> None:
    """What autocast would make pass, or cannot cast."""
    check_float("hidden_states", hidden_states)
    for name, weight, dims in (("gate_up_proj", gate_up_proj, "(E, 2I, H)"), ("down_proj", down_proj, "(E, H, I)")):
        check_weight(name, weight, dims)


def _check_projection(name: str, projection: Projection, dims: str) -> None:
    check_weight(f"{name}_proj", projection.weight, dims)
    if projection.lora is not None:
        check_lora(f"{name}_lora", projection.lora, f"{name}_proj", projection.weight)


def _check(hidden_states, top_k_index, top_k_weights, gate_up: Projection, down: Projection, activation) -> None:
    check_float("hidden_states", hidden_states)
    _once(gate_up.form, _check_projection, "gate_up", gate_up, "(E, 2I, H)")
    _once(down.form, _check_projection, "down", down, "(E, H, I)")
    gate_up_proj, down_proj = gate_up.weight, down.weight
    check_dims("top_k_index", top_k_index, "(T, k)")
    check_dims("top_k_weights", top_k_weights, "(T, k)")
    check_float("top_k_weights", top_k_weights)
    check_integer("top_k_index", top_k_index)
    for name, tensor in (("top_k_index", top_k_index), ("top_k_weights", top_k_weights)):
        check_like(name, tensor, "hidden_states", hidden_states, dtype=False)
        check_size(name, tensor, 0, hidden_states.shape[0], "T of hidden_states")
    check_size("top_k_weights", top_k_weights, 1, top_k_index.shape[1], "k of top_k_index")
    for name, weight in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj)):
        check_like(name, weight, "hidden_states", hidden_states, dtype=not isinstance(weight, FourBitWeight))
    check_size("gate_up_proj", gate_up_proj, 2, hidden_states.shape[1], "H of hidden_states")
    check_size("down_proj", down_proj, 0, gate_up_proj.shape[0], "E of gate_up_proj")
    check_size("down_proj", down_proj, 1, hidden_states.shape[1], "H of hidden_states")
    check_size("gate_up_proj", gate_up_proj, 1, 2 * down_proj.shape[2], "twice I of down_proj")
    check_activation(activation)


class FusedExperts(torch.autograd.Function):
    """The two ops without their way through PyTorch's dispatcher, for calls in which nobody else looks at them.

    That way costs the host more than the launches of a small batch: PyTorch looks up the op's schema once an argument.
    """

    @staticmethod
    def forward(ctx, top_k_index, gate_up, down, seed, activation, *leaves):
        hidden_states, top_k_weights, *_ = leaves
        out, *saved = run_forward(hidden_states, top_k_index, top_k_weights, gate_up, down, seed, activation, save=True)
        ctx.set_materialize_grads(False)
        ctx.others = (gate_up.without_leaves(), down.without_leaves()), activation
        ctx.save_for_backward(*leaves, top_k_index, *saved)
        return out

    @staticmethod
    def backward(ctx, grad_output):
        if grad_output is None:
            return (None,) * (OTHERS + LEAVES)
        projections, activation = ctx.others
        tensors = ctx.saved_tensors
        leaves, (top_k_index, seed, *saved) = tensors[:LEAVES], tensors[LEAVES:]
        hidden_states, top_k_weights, gate_up, down = _with_leaves(projections, leaves)
        tokens = (grad_output, hidden_states, top_k_index, top_k_weights)
        wanted = ctx.needs_input_grad[-LEAVES:]
        if torch.is_grad_enabled():
            # create_graph: the op must be in the graph, it refuses a second derivative, which would be wrong.
            saved = [hidden_states.new_empty(0) if x is None else x for x in saved]
            grads = backward_op(*tokens, *gate_up.flatten(), *down.flatten(), seed, activation, *saved, list(wanted))
        else:
            grads = BACKWARD[grad_output.device.type](
                *tokens, gate_up, down, seed, tuple(saved), activation, Gradients(*wanted)
            )
        return (None,) * OTHERS + tuple([grad if asked else None for asked, grad in zip(wanted, grads)])


def _leaves(hidden_states, top_k_weights, gate_up: Projection, down: Projection) -> Tuple[Optional[Tensor], ...]:
    """``Projection.leaves`` of both and the tokens', in the order of ``Gradients``."""
    (gate_up_proj, *gate_up_factors), (down_proj, *down_factors) = gate_up.leaves(), down.leaves()
    return (hidden_states, top_k_weights, gate_up_proj, down_proj, *gate_up_factors, *down_factors)


def _with_leaves(projections: Tuple[Projection, Projection], leaves: Tuple) -> Tuple:
    """hidden_states, top_k_weights and both projections, whole again."""
    hidden_states, top_k_weights, gate_up_proj, down_proj, *factors = leaves
    gate_up, down = projections
    gate_up, down = gate_up.with_leaves(gate_up_proj, *factors[:2]), down.with_leaves(down_proj, *factors[2:])
    return hidden_states, top_k_weights, gate_up, down


OTHERS, LEAVES = 5, len(Gradients._fields)  # of the arguments of FusedExperts
