"""What the ops should compute, in the plainest form: fp64, every token through every expert, gradients by autograd.

Nothing is sorted, grouped or skipped: all E experts see all rows and a gather keeps the chosen ones, so the oracle
shares no idea, and no mistake, with the code it judges. Expert E, whose slots are skipped, is a matrix of zeros.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F

Tensor = torch.Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}

RATIO = {
    torch.float64: 1e-12,
    torch.float32: 5e-6,
    torch.float16: 3 * 2.0**-11,
    torch.bfloat16: 3 * 2.0**-8,
}
"""How far a result may be from fp64, as a ratio of norms. In 16 bits that is three times the largest error of one
rounding. A result passes five or six: gate, up, their product, a slot's row, the sum of a token's rows; and, with
adapters, x A^T of both projections, each about half of what it is added to. Over many elements they average out.
In fp32 it is far below what products in TF32 give (3e-4)."""

FEW_RATIO = 2
"""How many times the ratio a tensor of few elements may be off: there all six roundings may be at their worst."""

WORST = 25
"""How many times the ratio one element may be off, measured against its own size plus the root mean square."""


def experts(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    activation: str = "silu",
) -> Tensor:
    """(T, H): the sum over each token's choices of weight * down(act(gate) * up)."""
    skipped = top_k_index == gate_up_proj.shape[0]
    gate, up = torch.einsum("th,eoh->teo", hidden_states, gate_up_proj).chunk(2, dim=-1)
    every = torch.einsum("tei,ehi->teh", ACTIVATIONS[activation](gate) * up, down_proj)
    every = F.pad(every, (0, 0, 0, 1))
    chosen = every.gather(1, top_k_index.long()[..., None].expand(-1, -1, every.shape[2]))
    return torch.einsum("tk,tkh->th", top_k_weights.masked_fill(skipped, 0), chosen)


def linear(input: Tensor, weight: Tensor, m_sizes: Tensor) -> Tensor:
    """(M, N): each row times its expert's matrix; rows behind the last expert are zero."""
    rows, experts = input.shape[0], weight.shape[0]
    of_row = torch.searchsorted(m_sizes.long().cumsum(0), torch.arange(rows, device=input.device), right=True)
    every = F.pad(torch.einsum("bi,eoi->beo", input, weight), (0, 0, 0, 1))
    return every.gather(1, of_row.clamp(max=experts)[:, None, None].expand(-1, 1, weight.shape[1]))[:, 0]


def gradients(
    function: Callable[..., Tensor], inputs: Mapping[str, Tensor], names: Iterable[str], grad_output: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The result of ``function`` in fp64, and its gradients with respect to the inputs called ``names``."""
    wide = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    leaves = [wide[name].requires_grad_() for name in names]
    out = function(*wide.values())
    return out.detach(), torch.autograd.grad(out, leaves, grad_output.double())


def assert_close(name: str, ref: Tensor, out: Tensor, ratio: float) -> None:
    """``out`` is ``ref`` up to ``ratio`` in norm, and no single element is far off. A NaN or inf never passes."""
    assert out.shape == ref.shape, f"{name}: shape {tuple(out.shape)}, expected {tuple(ref.shape)}"
    if not ref.numel():
        return
    ref, out = ref.double(), out.detach().double().to(ref.device)
    error, norm = (out - ref).norm().item(), ref.norm().item()
    assert error <= ratio * norm, (
        f"{name}: error {error:.3g} is {error / max(norm, 1e-300):.3g} of the norm, not {ratio}"
    )
    room = WORST * ratio * (ref.abs() + norm / ref.numel() ** 0.5)
    worst = ((out - ref).abs() - room).argmax().item()
    got, want = out.flatten()[worst].item(), ref.flatten()[worst].item()
    assert abs(got - want) <= room.flatten()[worst].item(), f"{name}: element {worst} is {got}, expected {want}"
