"""The package's functions in plain PyTorch: the CPU backend, written one expert at a time.

Each function has the arguments and results of the Triton launcher of the same name in ``kernels``. Matrix products
run in the dtype of their inputs; activations, their derivatives and the weighted sums run in fp32 (fp64 for fp64
inputs) and are rounded once.
"""

import math
from typing import Iterator, Optional, Tuple

import torch
import torch.nn.functional as F

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
    gate_up_proj: Tensor,
    down_proj: Tensor,
    activation: str,
    save: bool,
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """out (T, H), pre_activation (S, 2I) or (0, 2I), order (S,), m_sizes (E,)."""
    tokens, k = top_k_index.shape
    order, m_sizes = sort_by_expert(top_k_index, gate_up_proj.shape[0])
    pre_activation = hidden_states.new_zeros(tokens * k if save else 0, gate_up_proj.shape[1])
    slots = hidden_states.new_zeros(tokens * k, hidden_states.shape[1])
    for expert, rows, slot in _slot_groups(order, m_sizes):
        gate_up = F.linear(hidden_states[slot // k], gate_up_proj[expert])
        if save:
            pre_activation[rows] = gate_up
        slots[slot] = F.linear(_gated(gate_up, activation), down_proj[expert])
    out = combine(slots, top_k_weights, top_k_index, gate_up_proj.shape[0])
    return out, pre_activation, order, m_sizes


def experts_backward(
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
    """Gradients of hidden_states, top_k_weights, gate_up_proj, down_proj; those not asked for have size 0."""
    tokens, k = top_k_index.shape
    slots = grad_output.new_zeros(tokens * k, hidden_states.shape[1])
    grad_weights = top_k_weights.new_zeros(top_k_weights.shape)
    grad_gate_up_proj = gate_up_proj.new_zeros(gate_up_proj.shape if gate_up_proj_grad else 0)
    grad_down_proj = down_proj.new_zeros(down_proj.shape if down_proj_grad else 0)
    for expert, rows, slot in _slot_groups(order, m_sizes):
        weights = _wide(top_k_weights.reshape(-1)[slot])[:, None]
        grad = grad_output[slot // k]
        gate, up = _wide(pre_activation[rows]).chunk(2, dim=-1)
        grad_intermediate = _wide(grad @ down_proj[expert])
        activated, slope = _activate(gate, activation)
        intermediate = activated * up
        grad_gate_up = torch.cat((slope * up, activated), dim=-1) * (weights * grad_intermediate).repeat(1, 2)
        grad_gate_up = grad_gate_up.to(grad.dtype)
        grad_weights.view(-1)[slot] = (intermediate * grad_intermediate).sum(1).to(grad_weights.dtype)
        if hidden_states_grad:
            slots[slot] = grad_gate_up @ gate_up_proj[expert]
        if gate_up_proj_grad:
            grad_gate_up_proj[expert] = grad_gate_up.t() @ hidden_states[slot // k]
        if down_proj_grad:
            grad_down_proj[expert] = grad.t() @ (weights * intermediate).to(grad.dtype)
    grad_hidden_states = hidden_states.new_empty(0)
    if hidden_states_grad:
        grad_hidden_states = combine(slots, None, top_k_index, gate_up_proj.shape[0])
    return grad_hidden_states, grad_weights, grad_gate_up_proj, grad_down_proj


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
    if m_sizes.numel() and (int(m_sizes.min()) < 0 or int(m_sizes.sum()) != rows):
        raise ValueError(
            f"m_sizes must be non-negative and sum to the {rows} rows of input, got a sum of {int(m_sizes.sum())} "
            f"and a smallest entry of {int(m_sizes.min())}"
        )
    start = 0
    for expert, size in enumerate(m_sizes.tolist()):
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
