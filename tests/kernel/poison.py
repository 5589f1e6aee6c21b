"""Poisoned memory: what nobody has written reads as NaN, so an output left unwritten cannot pass for a zero."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch

POISON = 0x7FC07FC0
"""As bits: a NaN in fp32, and two NaNs in bf16 and in fp16. As an integer: an index that is always out of range."""

_GUARD = 64
_BLOCKS = (512, 1 << 16, 1 << 20, 1 << 20, 16 << 20, 64 << 20)
_MAKERS = ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty"))


@contextmanager
def poisoned_memory(device: str) -> Iterator[None]:
    """New memory is full of :data:`POISON`; on a CPU a guard around each new tensor must be untouched at the end."""
    if torch.device(device).type == "cuda":
        _poison_freed_blocks()
        yield
    else:
        with _poisoned_makers():
            yield


def _poison_freed_blocks() -> None:
    """Fills and frees blocks of many sizes: PyTorch's allocator hands the same bytes out again, unchanged."""
    blocks = [torch.full((size // 4,), POISON, dtype=torch.int32, device="cuda") for size in _BLOCKS for _ in range(4)]
    del blocks


@contextmanager
def _poisoned_makers() -> Iterator[None]:
    buffers: list[torch.Tensor] = []
    with ExitStack() as patches:
        for owner, name in _MAKERS:
            patches.enter_context(mock.patch.object(owner, name, _poisoned(getattr(owner, name), buffers)))
        yield
    for buffer in buffers:
        guards = torch.cat((buffer[:_GUARD], buffer[-_GUARD:]))
        clean = guards.isnan() if guards.is_floating_point() else guards == _fill(guards.dtype)
        assert bool(clean.all()), f"memory next to a tensor of {buffer.numel() - 2 * _GUARD} elements was written"


def _poisoned(make: Callable[..., torch.Tensor], buffers: list[torch.Tensor]) -> Callable[..., torch.Tensor]:
    def made(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = make(*args, **kwargs)
        extent = tensor.untyped_storage().nbytes() // tensor.element_size()
        buffers.append(torch.full((extent + 2 * _GUARD,), _fill(tensor.dtype), dtype=tensor.dtype))
        return tensor.set_(buffers[-1].untyped_storage(), _GUARD, tensor.shape, tensor.stride())

    return made


def _fill(dtype: torch.dtype) -> float:
    return float("nan") if dtype.is_floating_point else min(POISON, torch.iinfo(dtype).max)
