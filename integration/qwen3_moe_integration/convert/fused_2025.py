"""The layout of the 2025 project qwen3_moe_fused: a module a projection, each with the factors of all experts.

    {block}.{gate,up,down}_proj.lora_A.weight (E, r, in), .lora_B.weight (E, out, r)

Only the third dimension tells it from the dense MLP that a layer without experts has.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch

from .factors import Factors
from .layout import Experts, Layout, base_name, factors_of, key_pattern, pair_up
from .lora_config import Target

Tensor = torch.Tensor

_KEY = key_pattern("(?P<projection>gate_proj|up_proj|down_proj)")


class Fused2025(Layout):
    def owns(self, key: str, tensor: Tensor) -> bool:
        return tensor.dim() == 3 and _KEY.fullmatch(key) is not None

    def read(self, tensors: dict[str, Tensor], config: dict[str, Any], metadata: dict[str, str]) -> Experts:
        matches = {key: _KEY.fullmatch(key) for key, tensor in tensors.items() if self.owns(key, tensor)}
        stacks = {(m["block"], m["projection"], m["side"]): tensors[key] for key, m in matches.items()}
        experts = defaultdict(dict)
        for block, projection, A, B in pair_up(stacks):
            experts[block][projection] = factors_of(f"{base_name(block)}.{projection}", A, B, config)
        return dict(experts)

    def write(self, experts: Experts) -> dict[str, Tensor]:
        return {
            f"{block}.{projection}.lora_{side}.weight": stack
            for block, projections in experts.items()
            for projection, factors in projections.items()
            for side, stack in (("A", factors.A), ("B", factors.B))
        }

    def targets(self, block: str, projection: str, factors: Factors) -> Iterator[Target]:
        yield Target(f"{base_name(block)}.{projection}", factors)
