"""The experts layer as a plan of launches; ``..experts`` describes it, each kernel has a file of its own."""

from functools import partial
from typing import Iterator, Optional, Tuple

import torch

from ..projection import FourBitWeight, Gradients, Projection
from ..regime import Plan, plan, suits_gemv, window
from ..routed import new_routed, order_of, tiles_of
from ..tiling import cdiv, choose
from .adapter import adapters
from .combine import combine, combine_backward
from .dequantize import dequantize_experts
from .down_backward import down_backward
from .first_call import compiled_at_once, postponed
from .four_bit_fast import fast_weights, permuted
from .gate_up import gate_up
from .gemv import gemv
from .linear import linear_tiles
from .product import Stored, near
from .routing import route, tile_table
from .weight_grad import weight_grad_rows

Tensor = torch.Tensor
UNSAVED = (None,) * 4


def _forward_and_backward(*arguments) -> None:
    """``experts_forward``, and what is likely to follow: backward of all that is trained. That comes first, for its
    kernels take longest, and threads that compile wait for each other's Python.

    Gradient checkpointing computes a layer without gradients at first, and again before backward, with its result or
    without. Trained adapters are taken for a sign of that; weights are not, which require gradients unless someone says
    otherwise.
    """
    inputs, save, result = arguments[:7], arguments[7], arguments[8:9]
    *layer, seed, activation = inputs
    projections = layer[3:]
    weights = [not projection.four_bit and projection.weight.requires_grad for projection in projections]
    factors = [p.lora is not None and p.lora[i].requires_grad for p in projections for i in range(2)]
    checkpointed = not save and any(factors)
    forward = partial(experts_forward, *inputs)
    if save or checkpointed:
        with postponed():
            out, *saved = forward(True, *result)
        wanted = Gradients(True, True, *weights, *factors)
        experts_backward(torch.empty_like(out), *layer, seed, tuple(saved), activation, wanted)
    forward(save or checkpointed, *result)
    if checkpointed:
        forward(True, False)
        forward(False, *result)


@compiled_at_once(_forward_and_backward)
def experts_forward(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_projection: Projection,
    down_projection: Projection,
    seed: Optional[Tensor],
    activation: str,
    save: bool,
    result: bool = True,
    pre_activation: Optional[Tensor] = None,
) -> Tuple[Tensor, ...]:
    """As ``reference.experts_forward``; ``routed`` has tiles, too."""
    gate_up_proj, down_proj = gate_up_projection.weight, down_projection.weight
    experts, hidden, width = down_proj.shape
    hidden_states, top_k_index = near(hidden_states, hidden), top_k_index.contiguous()
    slots, k = top_k_index.numel(), top_k_index.shape[1]
    dtype, device = hidden_states.dtype, hidden_states.device
    if not save and suits_gemv(slots, gate_up_projection, down_projection, device):
        out = _forward_of_few(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, activation)
        return out, *UNSAVED
    dense = choose(slots, experts, dtype, device)
    chosen = plan(slots, gate_up_proj, down_proj, dtype, device, dense, backward=False)
    block_m, permute = chosen.block_m, chosen.permute
    routed = new_routed(top_k_index, experts, block_m)
    order, m_sizes = order_of(routed, slots, experts)
    offsets, tiles = tiles_of(routed, slots, experts, block_m)
    route(top_k_index, block_m, order, m_sizes, offsets, tiles)

    if save and pre_activation is None:
        pre_activation = hidden_states.new_empty(slots, 2 * width)
    gate_up_adapter, down_adapter = adapters(gate_up_projection, down_projection, dtype, seed, k, order, tiles, block_m)
    added = gate_up_adapter and gate_up_adapter.forward_addition(hidden_states, by_token=True)
    if chosen.path == "fast":
        gate_up_proj, down_proj = fast_weights((gate_up_proj, down_proj if result else None), m_sizes, dtype, permute)
    tokens = permuted(hidden_states) if permute else hidden_states
    tile, second = chosen.first.fit(width, hidden), chosen.second.fit(hidden, width)
    intermediate = hidden_states.new_empty(slots, width)
    out_slots = hidden_states.new_empty(slots, window(slots, hidden, second, dtype, chosen.path))
    for weight, expert in _parts(gate_up_proj, chosen, m_sizes, dtype, out_slots):
        gate_up(
            tokens, weight, order, tiles, k, activation, block_m, tile, pre_activation, intermediate, added, expert,
            permute,
        )  # fmt: skip
    weight = None  # frees its scratch before the other stack's is taken
    added_down = down_adapter and down_adapter.forward_addition(intermediate, permuted=permute)
    if result:
        out = hidden_states.new_empty(hidden_states.shape)
        for col, rows, sums in _windows(out_slots, out):
            for weight, expert in _parts(down_proj, chosen, m_sizes, dtype):
                linear_tiles(
                    intermediate, weight, offsets, tiles, block_m, second, rows, order, added_down, expert,
                    first_col=col,
                )  # fmt: skip
            combine(rows, top_k_weights, top_k_index, experts, sums)
    else:
        out = torch.full_like(hidden_states, torch.nan)  # whoever reads it shall notice
    if not save:
        return out, *UNSAVED
    low_rank = (added and added.low_rank, added_down and added_down.low_rank)
    return out, pre_activation, *low_rank, routed


@compiled_at_once()
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
    """The gradients that ``wanted`` names, and that of top_k_weights; None for the others."""
    pre_activation, low_rank_gate_up, low_rank_down, routed = saved
    gate_up_proj, down_proj = gate_up_projection.weight, down_projection.weight
    experts, hidden, width = down_proj.shape
    grad_output, hidden_states = near(grad_output, hidden), near(hidden_states, hidden)
    top_k_index = top_k_index.contiguous()
    slots, k = top_k_index.numel(), top_k_index.shape[1]
    dtype, device = hidden_states.dtype, hidden_states.device
    dense = choose(slots, experts, dtype, device)
    chosen = plan(slots, gate_up_proj, down_proj, dtype, device, dense, backward=True)
    block_m = chosen.block_m
    order, m_sizes = order_of(routed, slots, experts)
    table = tiles_of(routed, slots, experts, block_m)
    offsets, tiles = table or tile_table(m_sizes, slots, block_m, rest=-1)

    gate_up_adapter, down_adapter = adapters(gate_up_projection, down_projection, dtype, seed, k, order, tiles, block_m)
    if chosen.path == "fast":
        gate_up_proj, down_proj = fast_weights((gate_up_proj, down_proj), m_sizes, dtype)
    added = down_adapter and down_adapter.backward_addition(grad_output, by_token=True)
    weighted = hidden_states.new_empty(slots, width) if wanted.down_proj or wanted.down_A else None
    tile, second = chosen.first.fit(width, hidden), chosen.second.fit(hidden, 2 * width)
    grad_pre_activation = torch.empty_like(pre_activation)
    parts = torch.empty(cdiv(width, tile.block_n), slots, dtype=torch.float32, device=device)
    grad_slots = grad_hidden_states = None
    if wanted.hidden_states:
        grad_slots = hidden_states.new_empty(slots, window(slots, hidden, second, dtype, chosen.path))
    for weight, expert in _parts(down_proj, chosen, m_sizes, dtype, grad_slots):
        down_backward(
            grad_output, weight, pre_activation, top_k_weights, order, tiles, activation, block_m, tile,
            grad_pre_activation, parts, weighted, added, expert,
        )  # fmt: skip
    weight = None  # frees its scratch before the other stack's is taken
    grad_gate_up_proj = grad_down_proj = None
    grad_gate_up_factors = grad_down_factors = (None, None)
    step, tile = dense.weight_grad_block_m, dense.weight_grad
    if wanted.down_proj:
        grad_down_proj = weight_grad_rows(
            grad_output, weighted, offsets, step, tile.fit(hidden, width), order, k, grad_by_token=True
        )
    if wanted.down_A or wanted.down_B:
        grad_down_factors = down_adapter.factor_grads(
            weighted, grad_output, low_rank_down, added.low_rank, offsets, (wanted.down_A, wanted.down_B),
            weights=top_k_weights,
        )  # fmt: skip
    del weighted
    added = gate_up_adapter and gate_up_adapter.backward_addition(grad_pre_activation)
    grad_weights = torch.empty(top_k_index.shape, dtype=top_k_weights.dtype, device=device)
    if wanted.hidden_states:
        grad_hidden_states = hidden_states.new_empty(hidden_states.shape)
        for col, rows, sums in _windows(grad_slots, grad_hidden_states):
            for weight, expert in _parts(gate_up_proj, chosen, m_sizes, dtype):
                linear_tiles(
                    grad_pre_activation, weight, offsets, tiles, block_m, second, rows, order, added, expert,
                    transposed=True, first_col=col,
                )  # fmt: skip
            once = (None, None) if col else (parts, grad_weights)
            combine_backward(rows, once[0], top_k_index, experts, sums, once[1])
    else:
        combine_backward(None, parts, top_k_index, experts, None, grad_weights)
    weight = rows = grad_slots = None  # frees them before the largest gradient is taken
    if wanted.gate_up_proj:
        grad_gate_up_proj = weight_grad_rows(
            grad_pre_activation, hidden_states, offsets, step, tile.fit(2 * width, hidden), order, k, x_by_token=True
        )
    if wanted.gate_up_A or wanted.gate_up_B:
        grad_gate_up_factors = gate_up_adapter.factor_grads(
            hidden_states, grad_pre_activation, low_rank_gate_up, added.low_rank, offsets,
            (wanted.gate_up_A, wanted.gate_up_B), x_by_token=True,
        )  # fmt: skip
    grads = (grad_hidden_states, grad_weights, grad_gate_up_proj, grad_down_proj)
    return Gradients(*grads, *grad_gate_up_factors, *grad_down_factors)


def _forward_of_few(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: FourBitWeight,
    down_proj: FourBitWeight,
    activation: str,
) -> Tensor:
    """out (T, H) of ``experts_forward`` without sorting."""
    experts, hidden, width = down_proj.shape
    slots = top_k_index.numel()
    intermediate = hidden_states.new_empty(slots, width)
    gemv(hidden_states, gate_up_proj, top_k_index, intermediate, activation)
    out_slots = hidden_states.new_empty(slots, hidden)
    gemv(intermediate, down_proj, top_k_index, out_slots)
    out = hidden_states.new_empty(hidden_states.shape)
    combine(out_slots, top_k_weights, top_k_index, experts, out)
    return out


def _windows(slots: Tensor, out: Tensor) -> Iterator[Tuple[int, Tensor, Tensor]]:
    """The windows of out (T, H), as wide as slots (S, .): each one's first column, and both tensors' share of it."""
    hidden, width = out.shape[1], slots.shape[1]
    if width == hidden:
        yield 0, slots, out
    else:
        for col in range(0, hidden, width):
            yield col, slots[:, : hidden - col], out[:, col : col + width]


def _parts(
    weight: Stored,
    chosen: Plan,
    m_sizes: Tensor,
    dtype: torch.dtype,
    spare: Optional[Tensor] = None,
) -> Iterator[Tuple[Stored, int]]:
    """``weight`` as the kernels take it, and the number of its first expert.

    To be dequantized, it comes in runs of experts that share one scratch. ``spare`` is memory that nobody has written
    to yet, which serves as that if it is large enough.
    """
    if not isinstance(weight, FourBitWeight) or chosen.path == "plain":
        yield weight, 0
    else:
        experts, n, k = weight.shape
        spared = 0 if spare is None else spare.numel() // (n * k)
        most = max(1, spared, chosen.scratch // (n * k * dtype.itemsize))
        run = cdiv(experts, cdiv(experts, most))  # in as few runs, of lengths as even
        if spared < run:
            spare = m_sizes.new_empty(run * n * k, dtype=dtype)
        scratch = spare.view(-1)[: run * n * k].view(run, n, k)
        for first in range(0, experts, run):
            decoded = scratch[: experts - first]
            dequantize_experts(weight, first, decoded, m_sizes)
            yield decoded, first
