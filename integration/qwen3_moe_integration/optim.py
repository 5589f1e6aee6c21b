"""Adam with 8-bit states, by bitsandbytes, without a wait for the GPU after each parameter and by a faster kernel.

bitsandbytes waits for the sake of states that are paged between host and device. Others need none: a stream runs its
kernels in order. LoRA on attention and all experts is 12 parameters a layer, 576 in Qwen3-30B-A3B, and as many waits a
step in which the GPU has nothing to do.

The kernel, in ``adam_kernel``, reads and writes the states of bitsandbytes' own, which does all it does not take:
parameters whose states are in fp32, those that are not contiguous, paged states, and devices other than NVIDIA's.
"""

import functools
from collections.abc import Callable
from typing import Any, Optional

import bitsandbytes
import torch
from bitsandbytes.functional import create_dynamic_map

try:
    from .adam_kernel import adam_step
except ImportError:  # no Triton for this system
    adam_step = None

DEVICES = ("cuda",) if adam_step is not None and torch.version.cuda is not None else ()
"""Where the kernel runs: PyTorch calls AMD's GPUs cuda, too."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class AdamW8bit(bitsandbytes.optim.AdamW8bit):
    """``bitsandbytes.optim.AdamW8bit``: the same arguments and states, and numbers that differ by rounding."""

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

    def update_step(self, group: dict[str, Any], p: torch.nn.Parameter, gindex: int, pindex: int) -> None:
        """Changes one parameter and its states; the arguments are named as bitsandbytes' own."""
        state = self.state[p]
        if self.is_paged or not _is_for_kernel(p, state):
            super().update_step(group, p, gindex, pindex)
            return
        overridden = self.mng.index2config or self.mng.pid2config
        config = self.get_config(gindex, pindex, group) if overridden else group
        adam_step(p, p.grad, state, config["lr"], config["betas"], config["eps"], config["weight_decay"])


def _is_for_kernel(p: torch.nn.Parameter, state: dict[str, Any]) -> bool:
    grad = p.grad
    return (
        p.device.type in DEVICES
        and state["state1"].dtype == torch.uint8
        and type(p) in (torch.Tensor, torch.nn.Parameter)  # a DTensor has other sizes than its memory
        and p.dtype == grad.dtype
        and p.dtype in DTYPES
        and p.is_contiguous()
        and grad.is_contiguous()
        and _has_dynamic_maps(p.device, state)
    )


def _has_dynamic_maps(device: torch.device, state: dict[str, Any]) -> bool:
    """Whether the codes are those that the kernel computes. Comparing waits for the GPU: a map that was found equal is
    replaced by that which it equals, and from then on known by its identity."""
    for name, dynamic in zip(("qmap1", "qmap2"), _dynamic_maps(device)):
        if state[name] is not dynamic:
            if not torch.equal(state[name], dynamic):
                return False
            state[name] = dynamic
    return True


@functools.cache
def _dynamic_maps(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return create_dynamic_map(signed=True).to(device), create_dynamic_map(signed=False).to(device)
