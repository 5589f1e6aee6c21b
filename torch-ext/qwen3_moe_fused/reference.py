"""The package's functions in plain PyTorch: the CPU backend, written one expert at a time.

Each function has the arguments and results of the Triton launcher of the same name in ``kernels``. Matrix products
run in the dtype of their inputs; activations, their derivatives and the weighted sums run in fp32 (fp64 for fp64
inputs) and are rounded once.
"""

import math
from typing import Iterator, Optional, Tuple

import torch
import torch.nn.functional as F

from .projection import FourBitWeight, Gradients, Lora, Projection, Weight, empty_gradients
from .routed import new_sorted, order_of

Tensor = torch.Tensor


def routing(top_k_index: Tensor, num_experts: int, block_m: int) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`qwen3_moe_fused.routing`."""
    order, m_sizes = sort_by_expert(top_k_index, num_experts)
    return (order, m_sizes, *tile_table(m_sizes, order.numel(), block_m, rest=-1))


def sort_by_expert(top_k_index: Tensor, num_experts: int) -> Tuple[Tensor, Tensor]:
    """order (S,) and m_sizes (E,). Checks the values too: on a CPU that costs next to nothing."""
    ids = top_k_index.reshape(-1)
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) > num_experts):
        raise ValueError(
            f"top_k_index must lie in [0, {num_experts}] ({num_experts} marks a slot to skip), "
            f"got values from {int(ids.min())} to {int(ids.max())}"
        )
    order = torch.argsort(ids, stable=True).int()
    m_sizes = torch.bincount(ids, minlength=num_experts + 1)[:num_experts].int()
    return order, m_sizes


def tile_table(m_sizes: Tensor, rows: int, block_m: int, rest: int) -> Tuple[Tensor, Tensor]:
    """Offsets (E+1,) and tiles (rows // block_m + E + 1, 3), as ``kernels.routing`` lays them out.

    Tiles of expert e start at entry ``offsets[e] // block_m + e``, which leaves at most one unused entry, marked -1,
    between two experts. Rows behind the last expert get tiles of "expert" ``rest``.
    """
    experts = m_sizes.numel()
    offsets = F.pad(m_sizes.long().cumsum(0), (1, 0)).clamp(max=rows)
    tiles = torch.full((rows // block_m + experts + 1, 3), -1, dtype=torch.int32)
    bounds = [*offsets.tolist(), rows]
    for expert, (start, end) in enumerate(zip(bounds, bounds[1:])):
        label = expert if expert < experts else rest
        if label < 0:
            continue
        first = start // block_m + expert
        for i, row in enumerate(range(start, end, block_m)):
            tiles[first + i] = torch.tensor([label, row, end])
    return offsets.int().to(m_sizes.device), tiles.to(m_sizes.device)


def experts_forward(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up: Projection,
    down: Projection,
    seed: Optional[Tensor],
    activation: str,
    save: bool,
    result: bool = True,
    pre_activation: Optional[Tensor] = None,
) -> Tuple[Tensor, ...]:
    """out (T, H), of NaN unless ``result``; and for backward, None unless ``save``, pre_activation (S, 2I),
    low_rank_gate_up (S, R) and low_rank_down (S, R), None without an adapter, and ``routed``.

    ``pre_activation`` is saved in the place of that name, if one is given."""
    tokens, k = top_k_index.shape
    order, m_sizes = sort_by_expert(top_k_index, gate_up.weight.shape[0])
    rows_saved = tokens * k if save else 0
    if pre_activation is None:
        pre_activation = hidden_states.new_zeros(rows_saved, gate_up.weight.shape[1])
    low_rank = [hidden_states.new_zeros(rows_saved, p.low_rank_width) for p in (gate_up, down)]
    slots = hidden_states.new_zeros(tokens * k, hidden_states.shape[1])
    for expert, rows, slot in _slot_groups(order, m_sizes):
        both, low_rank_gate_up = _project(hidden_states[slot // k], gate_up, expert, slot, seed)
        gated = _gated(both, activation)
        slots[slot], low_rank_down = _project(gated, down, expert, slot, seed, stream=1)
        if save:
            pre_activation[rows] = both
            low_rank[0][rows], low_rank[1][rows] = low_rank_gate_up, low_rank_down
    out = combine(slots, top_k_weights, top_k_index, gate_up.weight.shape[0])
    if not result:
        out.fill_(torch.nan)  # whoever reads it shall notice
    routed = new_sorted(top_k_index, gate_up.weight.shape[0]).zero_()
    for to, tensor in zip(order_of(routed, tokens * k, gate_up.weight.shape[0]), (order, m_sizes)):
        to.copy_(tensor)
    saved = (pre_activation, *(x if x.shape[1] else None for x in low_rank), routed)
    return out, *(saved if save else [None] * len(saved))


def experts_backward(
    grad_output: Tensor,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up: Projection,
    down: Projection,
    seed: Optional[Tensor],
    saved: Tuple[Tensor, ...],
    activation: str,
    wanted: Gradients,
) -> Gradients:
    """The gradients that ``wanted`` names; the others have size 0."""
    pre_activation, low_rank_gate_up, low_rank_down, routed = saved
    tokens, k = top_k_index.shape
    order, m_sizes = order_of(routed, tokens * k, gate_up.weight.shape[0])
    grads = empty_gradients(hidden_states, top_k_weights, gate_up, down, wanted, Tensor.new_zeros)
    slots = grad_output.new_zeros(tokens * k, hidden_states.shape[1])
    for expert, rows, slot in _slot_groups(order, m_sizes):
        share = _wide(top_k_weights.reshape(-1)[slot])[:, None]
        grad = grad_output[slot // k]
        gate, up = _wide(pre_activation[rows]).chunk(2, dim=-1)
        activated, slope = _activate(gate, activation)
        intermediate = activated * up
        grad_intermediate = _wide(_project_back(grad, down, expert, slot, seed, stream=1))
        grad_pre_activation = torch.cat((slope * up, activated), dim=-1) * (share * grad_intermediate).repeat(1, 2)
        grad_pre_activation = grad_pre_activation.to(grad.dtype)
        grads.top_k_weights.view(-1)[slot] = (intermediate * grad_intermediate).sum(1).to(top_k_weights.dtype)
        if wanted.hidden_states:
            slots[slot] = _project_back(grad_pre_activation, gate_up, expert, slot, seed)
        if wanted.gate_up_proj:
            grads.gate_up_proj[expert] = grad_pre_activation.t() @ hidden_states[slot // k]
        if wanted.down_proj:
            grads.down_proj[expert] = grad.t() @ (share * intermediate).to(grad.dtype)
        if wanted.gate_up_A or wanted.gate_up_B:
            grad_A, grad_B = _factor_gradients(
                grad_pre_activation, hidden_states[slot // k], low_rank_gate_up[rows], gate_up.lora, expert, slot, seed
            )
            _fill(grads.gate_up_A, expert, grad_A)
            _fill(grads.gate_up_B, expert, grad_B)
        if wanted.down_A or wanted.down_B:
            weighted = (share * _wide(grad)).to(grad.dtype)
            grad_A, grad_B = _factor_gradients(
                weighted, intermediate.to(grad.dtype), low_rank_down[rows], down.lora, expert, slot, seed, stream=1
            )
            _fill(grads.down_A, expert, grad_A)
            _fill(grads.down_B, expert, grad_B)
    if wanted.hidden_states:
        grads.hidden_states.copy_(combine(slots, None, top_k_index, gate_up.weight.shape[0]))
    return grads


def _project(
    x: Tensor, projection: Projection, expert: int, slot: Tensor, seed: Optional[Tensor], stream: int = 0
) -> Tuple[Tensor, Optional[Tensor]]:
    """x (rows, K) through one expert's projection: (rows, N), rounded once; and scaling * x A^T (rows, R), if it has an
    A."""
    out = F.linear(x, _matrix(projection.weight, expert, x.dtype))
    lora = projection.lora
    if lora is None:
        return out, x.new_empty(x.shape[0], 0)
    low_rank = F.linear(_wide(_dropped(x, lora.dropout, slot, seed, stream)), _wide(lora.A[expert].to(x.dtype)))
    low_rank = (lora.scaling * low_rank).to(x.dtype)
    pairs = zip(low_rank.chunk(lora.halves, -1), lora.B[expert].to(x.dtype).chunk(lora.halves, 0))
    added = torch.cat([F.linear(_wide(a), _wide(b)) for a, b in pairs], -1)
    return (_wide(out) + added).to(x.dtype), low_rank


def _project_back(
    grad: Tensor, projection: Projection, expert: int, slot: Tensor, seed: Optional[Tensor], stream: int = 0
) -> Tensor:
    """From the gradient (rows, N) of a projection's result to that of its input (rows, K)."""
    grad_x = grad @ _matrix(projection.weight, expert, grad.dtype)
    lora = projection.lora
    if lora is None:
        return grad_x
    added = _wide(_grad_low_rank(grad, lora, expert) @ lora.A[expert].to(grad.dtype))
    return (_wide(grad_x) + _dropped(added, lora.dropout, slot, seed, stream)).to(grad.dtype)


def _grad_low_rank(grad: Tensor, lora: Lora, expert: int) -> Tensor:
    """The gradient (rows, R) of x A^T."""
    pairs = zip(grad.chunk(lora.halves, -1), lora.B[expert].to(grad.dtype).chunk(lora.halves, 0))
    return torch.cat([lora.scaling * (_wide(g) @ _wide(b)) for g, b in pairs], -1).to(grad.dtype)


def _factor_gradients(
    grad: Tensor, x: Tensor, low_rank: Tensor, lora: Lora, expert: int, slot: Tensor, seed, stream: int = 0
) -> Tuple[Tensor, Tensor]:
    """The gradients of one expert's A (R, K) and B (N, r), from that of the projection's result (rows, N)."""
    grad_A = _wide(_grad_low_rank(grad, lora, expert)).t() @ _wide(_dropped(x, lora.dropout, slot, seed, stream))
    pairs = zip(grad.chunk(lora.halves, -1), low_rank.chunk(lora.halves, -1))
    grad_B = torch.cat([_wide(g).t() @ _wide(a) for g, a in pairs])
    return grad_A, grad_B


def _fill(grad: Tensor, expert: int, value: Tensor) -> None:
    if grad.numel():
        grad[expert] = value.to(grad.dtype)


def _dropped(x: Tensor, dropout: float, slot: Tensor, seed: Optional[Tensor], stream: int) -> Tensor:
    if dropout == 0.0:
        return x
    return (_wide(x) * keep_mask(slot, x.shape[1], dropout, seed, stream) / (1.0 - dropout)).to(x.dtype)


def keep_mask(slot: Tensor, columns: int, dropout: float, seed: Tensor, stream: int) -> Tensor:
    """(rows, columns) bool: which elements dropout keeps. A hash of slot, column and seed, the same in every kernel
    that asks, so that no mask is ever stored; ``stream`` 0 is gate_up's, 1 is down's."""
    position = slot.long()[:, None] * columns + torch.arange(columns, device=slot.device)
    mixed = _mix32(_mix32(position & _UINT32) ^ _mix32((seed.long() * 2 + stream) & _UINT32))
    return mixed >= int(dropout * 2**32)


_UINT32 = 0xFFFFFFFF


def _mix32(x: Tensor) -> Tensor:
    """The 32-bit finalizer of MurmurHash3 (public domain), on the low half of int64."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = ((x ^ (x >> shift)) * factor) & _UINT32
    return x ^ (x >> 16)


def _matrix(weight: Weight, expert: int, dtype: torch.dtype) -> Tensor:
    """One expert's matrix (N, K)."""
    return dequantize_expert(weight, expert, dtype) if isinstance(weight, FourBitWeight) else weight[expert]


def dequantize(weight: FourBitWeight, dtype: torch.dtype) -> Tensor:
    """See :func:`qwen3_moe_fused.dequantize`."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for expert in range(weight.shape[0]):
        out[expert] = dequantize_expert(weight, expert, dtype)
    return out


def dequantize_expert(weight: FourBitWeight, expert: int, dtype: torch.dtype) -> Tensor:
    """One expert's matrix (N, K): code times absmax in fp32, rounded once, as bitsandbytes does it."""
    _, n, k = weight.shape
    first, last = expert * n * k, (expert + 1) * n * k
    packed = weight.packed[first // 2 : last // 2]
    values = weight.code[torch.stack((packed >> 4, packed & 15), dim=-1).flatten().long()]
    blocks = slice(first // weight.blocksize, (last - 1) // weight.blocksize + 1)
    absmax = weight.absmax[blocks]
    if weight.nested_blocksize:
        nested = torch.arange(blocks.start, blocks.stop, device=weight.device) // weight.nested_blocksize
        absmax = weight.nested_code[absmax.long()] * weight.nested_absmax[nested] + weight.nested_offset
    skip = first - blocks.start * weight.blocksize
    scales = absmax.repeat_interleave(weight.blocksize)[skip : skip + n * k]
    return (values * scales).to(dtype).view(n, k)


def combine(slots: Tensor, top_k_weights: Optional[Tensor], top_k_index: Tensor, num_experts: int) -> Tensor:
    """out (T, H): the sum of each token's slots, weighted if there are weights; skipped slots add nothing."""
    wide = _wide(slots.view(*top_k_index.shape, slots.shape[1]))
    if top_k_weights is not None:
        wide = wide * top_k_weights[..., None].to(wide.dtype)
    return wide.masked_fill(top_k_index[..., None] == num_experts, 0).sum(1).to(slots.dtype)


def linear(input: Tensor, weight: Tensor, m_sizes: Tensor) -> Tensor:
    """out (M, N): each expert's rows times its own (N, K) matrix."""
    out = input.new_zeros(input.shape[0], weight.shape[1])
    for expert, rows in _row_groups(m_sizes, input.shape[0]):
        out[rows] = F.linear(input[rows], weight[expert])
    return out


def weight_grad(grad_output: Tensor, input: Tensor, m_sizes: Tensor) -> Tensor:
    """out (E, N, K): each expert's grad_output (rows, N) transposed times its input (rows, K)."""
    out = input.new_zeros(m_sizes.numel(), grad_output.shape[1], input.shape[1])
    for expert, rows in _row_groups(m_sizes, input.shape[0]):
        out[expert] = grad_output[rows].t() @ input[rows]
    return out


def _row_groups(m_sizes: Tensor, rows: int) -> Iterator[Tuple[int, slice]]:
    """(expert, its rows) for every expert that has rows."""
    sizes = m_sizes.tolist()
    if sum(sizes) != rows or min(sizes, default=0) < 0:
        raise ValueError(
            f"m_sizes must be non-negative and sum to the {rows} rows of input, got a sum of {sum(sizes)} "
            f"and a smallest entry of {min(sizes, default=None)}"
        )
    start = 0
    for expert, size in enumerate(sizes):
        if size:
            yield expert, slice(start, start + size)
        start += size


def _slot_groups(order: Tensor, m_sizes: Tensor) -> Iterator[Tuple[int, slice, Tensor]]:
    """(expert, its rows, the slot at each row) for every expert that has rows."""
    for expert, rows in _row_groups(m_sizes, int(m_sizes.sum())):
        yield expert, rows, order[rows].long()


def _gated(gate_up: Tensor, activation: str) -> Tensor:
    gate, up = _wide(gate_up).chunk(2, dim=-1)
    return (_activate(gate, activation)[0] * up).to(gate_up.dtype)


def _activate(x: Tensor, activation: str) -> Tuple[Tensor, Tensor]:
    """The activation and its derivative."""
    if activation == "silu":
        sigmoid = torch.sigmoid(x)
        return x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))
    if activation == "gelu":
        cdf = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
        return x * cdf, cdf + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    tanh = torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)
    return 0.5 * x * (1 + tanh), 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * slope


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
