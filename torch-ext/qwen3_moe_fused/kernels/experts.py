"""The experts layer as a plan of launches; ``..experts`` describes it, each kernel has a file of its own."""

from typing import Optional, Tuple

import torch

from ..projection import Gradients, Projection, Weight
from ..reference import dequantize
from ..tiling import choose
from .adapter import adapters
from .combine import combine, combine_backward
from .down_backward import down_backward
from .gate_up import gate_up
from .linear import linear_tiles
from .routing import routing, tile_table
from .weight_grad import weight_grad_rows

Tensor = torch.Tensor


def experts_forward(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_projection: Projection,
    down_projection: Projection,
    seed: Optional[Tensor],
    activation: str,
    save: bool,
) -> Tuple[Tensor, ...]:
    """out (T, H); pre_activation (S, 2I), low_rank_gate_up (S, R) and low_rank_down (S, R), each with no rows unless
    ``save``; order (S,), m_sizes (E,)."""
    gate_up_proj, down_proj = (_dense(p.weight, hidden_states) for p in (gate_up_projection, down_projection))
    experts, hidden, width = down_proj.shape
    top_k_index = top_k_index.contiguous()
    slots, k = top_k_index.numel(), top_k_index.shape[1]
    dtype = hidden_states.dtype
    tiling = choose(slots, experts, dtype, hidden_states.device)
    order, m_sizes, _, tiles = routing(top_k_index, experts, tiling.block_m)

    pre_activation = hidden_states.new_empty(slots if save else 0, 2 * width)
    saved = pre_activation if save else None
    tile = tiling.gate_up.fit(width, hidden)
    block_m = tiling.block_m
    gate_up_adapter, down_adapter = adapters(gate_up_projection, down_projection, dtype, seed, k, order, tiles, block_m)
    added = gate_up_adapter and gate_up_adapter.forward_addition(hidden_states, by_token=True)
    intermediate = gate_up(hidden_states, gate_up_proj, order, tiles, k, activation, block_m, tile, saved, added)
    added_down = down_adapter and down_adapter.forward_addition(intermediate)
    out_slots = hidden_states.new_empty(slots, hidden)
    tile = tiling.linear.fit(hidden, width)
    linear_tiles(intermediate, down_proj, tiles, block_m, tile, out_slots, order, added_down)
    out = combine(out_slots, top_k_weights, top_k_index, experts)
    rows = slots if save else 0
    low_rank = (hidden_states.new_empty(rows, 0) if a is None else a.low_rank[:rows] for a in (added, added_down))
    return out, pre_activation, *low_rank, order, m_sizes


def experts_backward(
    grad_output: Tensor,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_projection: Projection,
    down_projection: Projection,
    seed: Optional[Tensor],
    saved: Tuple[Tensor, ...],
    activation: str,
    wanted: Gradients,
) -> Gradients:
    """The gradients that ``wanted`` names; the others have size 0."""
    pre_activation, low_rank_gate_up, low_rank_down, order, m_sizes = saved
    gate_up_proj, down_proj = (_dense(p.weight, hidden_states) for p in (gate_up_projection, down_projection))
    experts, hidden, width = down_proj.shape
    top_k_index = top_k_index.contiguous()
    slots, k = top_k_index.numel(), top_k_index.shape[1]
    dtype = hidden_states.dtype
    tiling = choose(slots, experts, dtype, hidden_states.device)
    block_m = tiling.block_m
    offsets, tiles = tile_table(m_sizes, slots, block_m, rest=-1)

    gate_up_adapter, down_adapter = adapters(gate_up_projection, down_projection, dtype, seed, k, order, tiles, block_m)
    added = down_adapter and down_adapter.backward_addition(grad_output, by_token=True)
    weighted = hidden_states.new_empty(slots, width) if wanted.down_proj or wanted.down_A else None
    grad_pre_activation, parts = down_backward(
        grad_output, down_proj, pre_activation, top_k_weights, order, tiles, activation, block_m,
        tiling.down_backward.fit(width, hidden), weighted, added,
    )  # fmt: skip
    grads = Gradients(*(hidden_states.new_empty(0) for _ in wanted))
    step, tile = tiling.weight_grad_block_m, tiling.weight_grad
    if wanted.down_proj:
        grad_down_proj = weight_grad_rows(
            grad_output, weighted, offsets, step, tile.fit(hidden, width), order, k, grad_by_token=True
        )
        grads = grads._replace(down_proj=grad_down_proj)
    if wanted.down_A or wanted.down_B:
        grad_A, grad_B = down_adapter.factor_grads(
            weighted, grad_output, low_rank_down, added.low_rank, offsets, (wanted.down_A, wanted.down_B),
            weights=top_k_weights,
        )  # fmt: skip
        grads = grads._replace(down_A=grad_A, down_B=grad_B)
    del weighted
    if wanted.gate_up_proj:
        grad_gate_up_proj = weight_grad_rows(
            grad_pre_activation, hidden_states, offsets, step, tile.fit(2 * width, hidden), order, k, x_by_token=True
        )
        grads = grads._replace(gate_up_proj=grad_gate_up_proj)
    added = gate_up_adapter and gate_up_adapter.backward_addition(grad_pre_activation)
    if wanted.gate_up_A or wanted.gate_up_B:
        grad_A, grad_B = gate_up_adapter.factor_grads(
            hidden_states, grad_pre_activation, low_rank_gate_up, added.low_rank, offsets,
            (wanted.gate_up_A, wanted.gate_up_B), x_by_token=True,
        )  # fmt: skip
        grads = grads._replace(gate_up_A=grad_A, gate_up_B=grad_B)
    grad_slots = None
    if wanted.hidden_states:
        grad_slots = hidden_states.new_empty(slots, hidden)
        tile = tiling.linear.fit(hidden, 2 * width)
        linear_tiles(
            grad_pre_activation, gate_up_proj.transpose(1, 2), tiles, block_m, tile, grad_slots, order, added
        )  # fmt: skip
    grad_hidden_states, grad_weights = combine_backward(grad_slots, parts, top_k_index, experts, top_k_weights.dtype)
    if wanted.hidden_states:
        grads = grads._replace(hidden_states=grad_hidden_states)
    return grads._replace(top_k_weights=grad_weights)


def _dense(weight: Weight, like: Tensor) -> Tensor:
    return weight if isinstance(weight, Tensor) else dequantize(weight, like.dtype)
