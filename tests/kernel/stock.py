"""What a stock library makes of a layer's step: one expert after the other, each a dense product in the given dtype.

In 16 bit, on the weights that bitsandbytes decodes to 16 bit, this is what a kernel's error is measured by; in fp64, on
those that it decodes to fp32, it is the right answer. Adapters are applied as PEFT does, beside the weight. A token's
rows are added in fp32 and rounded once: Transformers, which adds them up in 16 bit, is further off.
"""

from collections.abc import Callable, Iterable
from typing import Optional

import torch
import torch.nn.functional as F

from .adapted import FACTORS, decoded
from .steps import Step

Tensor = torch.Tensor

WITHIN = 1.2
"""How many times stock's error a result's may be."""


def assert_within_stock(steps: Iterable[Step], record: Callable[[str, object], None], gradients: bool = True) -> None:
    """Each result's error, of all steps together, is at most WITHIN times stock's; ``record`` gets both.

    A single tensor of few elements would not do: whose roundings are the luckier is then a matter of chance.
    """
    squares: dict[str, Tensor] = {}
    for step in steps:
        ours = step() if gradients else step.inference()
        right, stock = (stock_step(step, dtype, gradients) for dtype in (torch.float64, step.hidden_states.dtype))
        assert ours.keys() == right.keys() == stock.keys()
        for name, want in right.items():
            parts = (ours[name].double() - want, stock[name].double() - want, want)
            squares[name] = squares.get(name, 0) + torch.stack([part.square().sum() for part in parts])
    for name, sums in squares.items():
        error, of_stock, norm = sums.sqrt().tolist()
        record(f"error of {name}, kernel and stock", (error / norm, of_stock / norm))
        print(f"{name}: {error / norm:.3e}, in stock {of_stock / norm:.3e}: {error / of_stock:.2f} times")
        assert 0 < error <= WITHIN * of_stock, name


def stock_step(step: Step, dtype: torch.dtype, gradients: bool = True) -> dict[str, Tensor]:
    """The results of ``step``, whose experts are in 4 bit, by their names there."""
    stacks = [decoded(stack, torch.float32 if dtype == torch.float64 else dtype).to(dtype) for stack in step.experts]
    leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in step.leaves.items()}
    hidden_states, top_k_weights = leaves["hidden_states"], leaves["top_k_weights"]
    factors = [leaves.get(name) for name in FACTORS]
    scaling = step.adapter.scaling if step.adapter else 1.0

    k, experts = step.top_k_index.shape[1], stacks[0].shape[0]
    order = step.top_k_index.flatten().argsort()
    sizes = step.top_k_index.flatten().bincount(minlength=experts).tolist()
    slots = hidden_states[:, None].expand(-1, k, -1).flatten(0, 1)[order].split(sizes)
    results = []
    for expert, rows in enumerate(slots):
        gate_up_proj, down_proj, *lora = (x if x is None else x[expert] for x in (*stacks, *factors))
        gate, up = _projected(rows, gate_up_proj, *lora[:2], scaling).chunk(2, dim=-1)
        results.append(_projected(F.silu(gate) * up, down_proj, *lora[2:], scaling))
    rows = torch.cat(results)[order.argsort()].view(*step.top_k_index.shape, -1)
    out = (rows * top_k_weights[..., None]).sum(1)
    if not gradients:
        return {"output": out.detach()}
    grads = torch.autograd.grad(out, [*leaves.values()], step.grad_output.to(dtype))
    return {"output": out.detach(), **{f"gradient of {name}": x for name, x in zip(leaves, grads)}}


def _projected(x: Tensor, weight: Tensor, A: Optional[Tensor], B: Optional[Tensor], scaling: float) -> Tensor:
    out = F.linear(x, weight)
    return out if A is None else out + scaling * F.linear(F.linear(x, A), B)
