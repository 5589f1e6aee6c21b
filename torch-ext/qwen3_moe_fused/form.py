"""The form of arguments: all that checks look at and that code decides by, and nothing of what tensors hold.

Arguments of a form that has passed its checks pass them again, and a call with arguments of the same form launches the
same kernels in the same tiles. So what takes the host time to find is kept by form.
"""

from typing import Any, Dict, List, Optional, Tuple

import torch

PLAIN = {torch.Tensor, torch.nn.Parameter}
ATOMS = {int, float, bool, str, tuple, type(None), torch.dtype}
"""Kinds of values that are no tensors and hold none: to look one up takes a fifth of the time that isinstance takes."""

_MOST = 1024


def form_of(*values: Any) -> Optional[Tuple]:
    """None while torch.compile looks, or if one of the values is another kind of tensor: its sizes may be no numbers.

    Named tuples are looked into. Values that cannot be hashed leave a form that cannot be hashed.
    """
    if torch.compiler.is_compiling():
        return None
    form, left = [], [*values]
    for value in left:  # grows
        kind = type(value)
        if kind in PLAIN:
            form += (value.dtype, value.shape, value.stride(), value.device)
        elif kind in ATOMS:
            form.append(value)
        elif isinstance(value, tuple):
            form.append(kind)
            left += value
        elif isinstance(value, torch.Tensor):
            return None
        else:
            form.append(value)
    return tuple(form)


class ByForm(Dict[Tuple, Any]):
    """What was found for a form. It starts anew before it is too large: lengths of batches may have no end."""

    def __init__(self) -> None:
        super().__init__()
        _tables.append(self)

    def keep(self, form: Tuple, value: Any) -> None:
        if len(self) >= _MOST:
            self.clear()
        self[form] = value


_tables: List[ByForm] = []


def forget() -> None:
    """For whoever changes what code decides by beside arguments, as tuning does: nothing found before holds then."""
    for table in _tables:
        table.clear()
