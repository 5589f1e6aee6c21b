"""Calls that come again are replayed.

Which kernels a call launches, in what tiles, on memory of what sizes, follows from the form of its arguments. Working
that out takes the host longer than a small batch takes the GPU. So the second call of a form is recorded (the first may
compile), and the calls after it repeat what it did, with addresses of their own, and decide nothing.
"""

import threading
from typing import Any, Callable, List, Optional, Tuple

import torch

from ..form import ATOMS, ByForm, form_of
from ..projection import Gradients, Projection
from .record import Recording

Tensor = torch.Tensor

_records = ByForm()
"""A call's record: None after the first call, one without launches if it cannot be replayed."""

_one_at_a_time = threading.Lock()
"""Held by the thread that records. PyTorch keeps in one global whether a dispatch mode is on: where two threads enter
theirs and leave in turns it stays set, and torch.compile may compile nothing any more."""


def replayed(function: Callable[..., Tuple], *arguments: Any) -> Tuple:
    """``function(*arguments)``, which launches kernels on the current device and returns a tuple of tensors and None.

    Arguments are tensors, projections, tuples of tensors and None, which gradients are wanted, and what can be hashed.
    """
    tensors, form = _form(function, arguments)
    if form is None:
        return function(*arguments)
    try:
        record = _records.get(form, False)
    except TypeError:  # cannot be hashed
        return function(*arguments)
    if record:
        results = record.launches and record.replay(tensors)
        return results or function(*arguments)
    if record is None and _one_at_a_time.acquire(blocking=False):
        try:
            with Recording(tensors) as recording:
                results = function(*arguments)
        finally:
            _one_at_a_time.release()
        _records[form] = recording.record(results)
        return results
    results = function(*arguments)
    if record is False:
        _records.keep(form, None)
    return results


def _form(function: Callable, arguments: Tuple) -> Tuple[List[Tensor], Optional[Tuple]]:
    """The tensors among ``arguments``, and the form of them all, None if one has none. Of tensors in a tuple, which
    forward has saved for backward, only which are there, their dtypes and shapes: hooks may keep them smaller, in
    another dtype, and routed may come with tiles or without."""
    tensors, alone, others = [], [], [function]
    for value in arguments:
        if type(value) is Projection:
            if value.form is None:
                return tensors, None
            tensors += value.tensors()
            others.append(value.form)
        elif type(value) is Gradients:
            others.append(value)
        elif isinstance(value, tuple):
            tensors += [x for x in value if type(x) not in ATOMS]
            for x in value:
                others += (x,) if type(x) in ATOMS else (x.dtype, x.shape)
        else:
            if type(value) not in ATOMS and isinstance(value, Tensor):
                tensors.append(value)
            alone.append(value)
    form = form_of(*alone)
    return tensors, None if form is None else (form, *others)
