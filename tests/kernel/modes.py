"""A look at the kernel's ops while they run."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Seen(TorchDispatchMode):
    """Names and arguments of the kernel's ops, in order, that ran while it was entered."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []
        self.arguments: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace.startswith("_qwen3_moe_fused"):
            self.ops.append(func._opname)
            self.arguments.append(args)
        return func(*args, **(kwargs or {}))
