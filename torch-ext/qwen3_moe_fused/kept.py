"""Layers that are computed twice, as gradient checkpointing does: what the first pass saves serves the second.

The first pass runs without gradients, for its result; the second for its gradients, and nobody reads its result. Of the
experts, the second needs only what their backward reads, and the first has computed that on its way.
"""

from contextlib import contextmanager
from contextvars import ContextVar
from typing import Callable, ContextManager, Iterator, List, Optional, Sequence, Tuple

import torch

from .backends import FORWARD

Tensor = torch.Tensor
Saved = Tuple[Optional[Tensor], ...]
"""Of one call: the seed of its dropout, then what ``reference.experts_forward`` saves; None where there is nothing."""


def keeping(kept: Optional[List[Saved]] = None) -> ContextManager[List[Saved]]:
    """Inside, each call of :func:`fused_experts` keeps what its backward would read, gradients or not.

    Calls that PyTorch's dispatcher sees (under torch.compile, a dispatch mode or torch.func) keep nothing.

    Args:
        kept: a list that such calls have filled before. The same calls in the same order fill it again, in the same
            memory, as a CUDA graph has to.

    Yields:
        ``kept``, or a new list: a tuple of tensors and None for each call. For each slot (token and expert) they take
        2I numbers of the dtype of the hidden states, one for each rank of its adapters, and an index.

    Raises:
        TypeError: ``kept`` is no list.
        ValueError: by a call that differs from the one that ``kept`` holds in its place in sizes, dtype, ranks or
            whether there is dropout.
    """
    kept = [] if kept is None else kept
    if not isinstance(kept, list):
        raise TypeError(f"kept must be a list, as keeping() gives it, got {type(kept).__name__}")
    return _entered(_First(kept), kept)


def for_gradients(kept: Sequence[Saved] = ()) -> ContextManager[None]:
    """Inside, layers are computed a second time for the sake of their gradients, as gradient checkpointing does.

    What backward reads is computed. The result of :func:`fused_experts`, which it does not read, is NaN: the down
    projection is saved. This is for callers none of whose gradients read it either, as in a decoder layer that ends by
    adding it to the residual.

    Args:
        kept: what the same calls in the same order kept in :func:`keeping`: then nothing is computed, and dropout is
            that of the first time. Calls beyond are computed.

    Raises:
        TypeError: ``kept`` is no list or tuple.
        ValueError: as :func:`keeping`.
    """
    if not isinstance(kept, (list, tuple)):
        raise TypeError(f"kept must be a list or tuple, as keeping() gives it, got {type(kept).__name__}")
    return _entered(_Second(kept), None)


def run_forward(*inputs, save: bool) -> Tuple[Optional[Tensor], ...]:
    """out, the seed of dropout, and what is saved for backward.

    ``inputs`` are those of ``reference.experts_forward`` up to ``save``. They are computed once, unless this is inside
    of one of the above.
    """
    forward, current = FORWARD[inputs[0].device.type], _pass.get()
    if current is not None:
        return current(forward, inputs, save)
    out, *saved = forward(*inputs, save)
    return out, _seed(inputs), *saved


class _First:
    def __init__(self, kept: List[Saved]):
        self.kept, self.places = kept, iter(kept[:])

    def __call__(self, forward: Callable, inputs: Tuple, save: bool) -> Tuple[Optional[Tensor], ...]:
        place = next(self.places, None)
        if place is not None:
            _check_same(place, inputs)
        out, *saved = forward(*inputs, True, True, place and place[1])
        saved = (_seed(inputs), *saved)
        if place is None:
            self.kept.append(saved)
            return out, *saved
        for to, tensor in zip(place, saved):
            if to is not tensor:
                to.copy_(tensor)
        return out, *place


class _Second:
    def __init__(self, kept: Sequence[Saved]):
        self.left = iter(kept)

    def __call__(self, forward: Callable, inputs: Tuple, save: bool) -> Tuple[Optional[Tensor], ...]:
        kept = next(self.left, None)
        if kept is None or not save:
            out, *saved = forward(*inputs, save, not save)
            return out, _seed(inputs), *saved
        _check_same(kept, inputs)
        return torch.full_like(inputs[0], torch.nan), *kept  # whoever reads it shall notice


def _check_same(kept: Saved, inputs: Tuple) -> None:
    """Kernels write and read what is kept by the sizes of a call."""
    hidden_states, top_k_index, _, gate_up, down, *_ = inputs
    seed, pre_activation, *low_rank = kept[:4]
    slots, columns = pre_activation.shape
    ranks = [0 if x is None else x.shape[1] for x in low_rank]
    got = _form(slots, columns, pre_activation.dtype, ranks, seed)
    ranks = [gate_up.low_rank_width, down.low_rank_width]
    want = _form(top_k_index.numel(), gate_up.weight.shape[1], hidden_states.dtype, ranks, _seed(inputs))
    if got != want:
        raise ValueError(f"kept must be of the same calls as are made again, got {got} for {want}")


def _form(slots: int, columns: int, dtype: torch.dtype, ranks: List[int], seed: Optional[Tensor]) -> str:
    dropout = "no dropout" if seed is None else "dropout"
    return f"{slots} slots of {columns} columns in {dtype}, adapters of {ranks[0]} and {ranks[1]} ranks, {dropout}"


def _seed(inputs: Tuple) -> Optional[Tensor]:
    return inputs[-2]


_pass: ContextVar[Optional[Callable]] = ContextVar("pass", default=None)


@contextmanager
def _entered(first_or_second: Callable, value: Optional[List[Saved]]) -> Iterator[Optional[List[Saved]]]:
    before = _pass.set(first_or_second)
    try:
        yield value
    finally:
        _pass.reset(before)
