"""Adam with 8-bit states, by bitsandbytes, without a wait for the GPU after each parameter.

bitsandbytes waits for the sake of states that are paged between host and device. Others need none: a stream runs its
kernels in order. LoRA on attention and all experts is 12 parameters a layer, 576 in Qwen3-30B-A3B, and as many waits a
step in which the GPU has nothing to do.
"""

from collections.abc import Callable
from typing import Optional

import bitsandbytes
import torch


class AdamW8bit(bitsandbytes.optim.AdamW8bit):
    """``bitsandbytes.optim.AdamW8bit``: the same arguments, states and numbers."""

    def step(self, closure: Optional[Callable] = None) -> Optional[torch.Tensor]:
        """Changes every parameter that has a gradient; returns what ``closure`` does, which is called first."""
        if self.is_paged:
            return super().step(closure)
        with torch.enable_grad():
            loss = None if closure is None else closure()
        if not self.initialized:
            self.check_overrides()
            self.to_gpu()
            self.initialized = True
        for g, group in enumerate(self.param_groups):
            for p, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    if not self.state[parameter]:
                        self.init_state(group, parameter, g, p)
                    self.update_step(group, parameter, g, p)
        return loss
