"""The per-expert layout: every expert has linear layers of its own, as in Transformers v4, vLLM and llama.cpp.

{block}.experts.{e}.{gate,up,down}_proj.lora_A.weight (r, in), .lora_B.weight (out, r)
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch

from .factors import Factors
from .layout import Experts, Layout, base_name, factors_of, key_pattern, pair_up
from .lora_config import Target

Tensor = torch.Tensor

_KEY = key_pattern(r"experts\.(?P<expert>\d+)\.(?P<projection>gate_proj|up_proj|down_proj)")


class PerExpert(Layout):
    def owns(self, key: str, tensor: Tensor) -> bool:
        return _KEY.fullmatch(key) is not None

    def read(self, tensors: dict[str, Tensor], config: dict[str, Any], metadata: dict[str, str]) -> Experts:
        found = defaultdict(dict)
        for key, tensor in tensors.items():
            if match := _KEY.fullmatch(key):
                found[match["block"], match["projection"], match["side"]][int(match["expert"])] = tensor
        count = 1 + max(max(experts) for experts in found.values())
        stacks = {stack: _stack(stack, experts, count) for stack, experts in found.items()}
        experts = defaultdict(dict)
        for block, projection, A, B in pair_up(stacks):
            # PEFT could give each expert its own rank and alpha; a stack has one of each.
            ways = [factors_of(f"{base_name(block)}.experts.{e}.{projection}", A, B, config) for e in range(count)]
            if len({factors.scaling for factors in ways}) > 1:
                raise ValueError(f"{block}.experts.*.{projection} must have one alpha for all experts")
            experts[block][projection] = ways[0]
        return dict(experts)

    def write(self, experts: Experts) -> dict[str, Tensor]:
        return {
            f"{block}.experts.{e}.{projection}.lora_{side}.weight": stack[e]
            for block, projections in experts.items()
            for projection, factors in projections.items()
            for side, stack in (("A", factors.A), ("B", factors.B))
            for e in range(len(stack))
        }

    def targets(self, block: str, projection: str, factors: Factors) -> Iterator[Target]:
        for e in range(len(factors.A)):
            yield Target(f"{base_name(block)}.experts.{e}.{projection}", factors)


def _stack(stack: tuple[str, str, str], experts: dict[int, Tensor], count: int) -> Tensor:
    block, projection, side = stack
    name = f"{block}.experts.*.{projection}.lora_{side}"
    if missing := sorted(set(range(count)) - set(experts)):
        raise ValueError(f"{name}: the adapter has {count} experts, but {missing} are missing here")
    forms = {(tuple(tensor.shape), tensor.dtype) for tensor in experts.values()}
    if len(forms) > 1:
        raise ValueError(f"{name} must have one shape and dtype for all experts, got {sorted(map(str, forms))}")
    return torch.stack([experts[e] for e in range(count)])
