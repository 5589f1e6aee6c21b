"""Calls that come again are replayed.

Which kernels a call launches, in what tiles, on memory of what sizes, follows from the form of its arguments. Working
that out takes the host longer than a small batch takes the GPU. So the second call of a form is recorded: what it
allocates, what it launches, and whose address each pointer of a launch is. The calls after it repeat that with
addresses of their own, and decide nothing.

A record must hold all that a call does on the device, and nobody may guess whose an address is. A call that computes by
PyTorch's ops instead of :func:`launch`, or passes a pointer into an argument that is not its start, is never replayed:
the code runs each time.
"""

from dataclasses import replace
from operator import itemgetter
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from ..form import ByForm, form_of
from ..projection import Projection
from .launch import thread

Tensor = torch.Tensor
Place = int
"""Where something stands in a call's table: the address of an argument or of an allocation, or what launches take."""

ALIGNMENT = 16
"""Bytes. Whether an address is a multiple is all that code and compiled kernels depend on."""


class Launch(NamedTuple):
    """In the order in which it happens; the last are allocations that nobody reads any more."""

    allocations: List[Tuple[Place, Tuple[int, ...], torch.dtype]]
    made: List[Tuple[Place, Callable[[List], Any]]]  # of what stands in the table
    run: Callable
    arguments: itemgetter
    freed: List[Place]


class Record(NamedTuple):
    """What a call did. Its table begins with the arguments' addresses and goes on with ``table``; ``same`` are pairs of
    arguments that were one."""

    table: List
    stream: Place
    same: List[Tuple[Place, Place]]
    launches: List[Launch]
    results: List[Optional[Place]]
    make_results: Callable

    def replay(self, tensors: List[Tensor]) -> Optional[Tuple]:
        """The call's results with these arguments; None if they do not lie in memory as the recorded ones did."""
        addresses = [tensor.data_ptr() for tensor in tensors]
        together = 0
        for address in addresses:
            together |= address
        if together % ALIGNMENT or any([addresses[i] != addresses[j] for i, j in self.same]):
            return None
        table, held = addresses + self.table, dict(enumerate(tensors))
        device = tensors[0].device
        table[self.stream] = driver.active.get_current_stream(device.index)
        for allocations, made, run, arguments, freed in self.launches:
            for place, shape, dtype in allocations:
                held[place] = tensor = torch.empty(*shape, dtype=dtype, device=device)
                table[place] = tensor.data_ptr()
            for place, make in made:
                table[place] = make(table)
            run(*arguments(table))
            for place in freed:
                del held[place]
        return self.make_results([None if place is None else held[place] for place in self.results])


_records = ByForm()
"""A call's record: None after the first call, one without launches if it cannot be replayed."""


def replayed(function: Callable[..., Tuple], *arguments: Any) -> Tuple:
    """``function(*arguments)``, which launches kernels on the current device and returns a tuple of tensors and None.

    Arguments are tensors, projections, tuples of tensors and None, and what can be hashed.
    """
    tensors, form = _form(function, arguments)
    if form is None:
        return function(*arguments)
    record = _records.get(form, False)
    if record:
        results = record.launches and record.replay(tensors)
        return results or function(*arguments)
    if record is None:
        with _Recording(tensors) as recording:
            results = function(*arguments)
        _records[form] = recording.record(results)
    else:
        results = function(*arguments)
        _records.keep(form, None)
    return results


def _form(function: Callable, arguments: Tuple) -> Tuple[List[Tensor], Optional[Tuple]]:
    """The tensors among ``arguments``, and the form of them all, None if one has none. Of tensors in a tuple only which
    are there: forward has saved them for backward, and their forms follow from the others'."""
    tensors, flat = [], [function]
    for value in arguments:
        if type(value) is Projection:
            if value.form is None:
                return tensors, None
            tensors += value.tensors()
            flat.append(value.form)
        elif isinstance(value, tuple):
            tensors += [x for x in value if isinstance(x, Tensor)]
            flat += [isinstance(x, Tensor) or x for x in value]
        else:
            if isinstance(value, Tensor):
                tensors.append(value)
            flat.append(value)
    return tensors, form_of(*flat)


_aten = torch.ops.aten
_ALLOCATE = {_aten.empty, _aten.empty_like, _aten.new_empty}
_VIEW = {_aten.alias, _aten.view, _aten.transpose, _aten.slice, _aten.detach}


class _Recording(TorchDispatchMode):
    """While entered, notes what this thread allocates and launches."""

    def __init__(self, tensors: List[Tensor]):
        super().__init__()
        addresses = [tensor.data_ptr() for tensor in tensors]
        self.arguments: Dict[int, Place] = {}  # by address
        for place, address in enumerate(addresses):
            self.arguments.setdefault(address, place)
        self.same = [(self.arguments[x], i) for i, x in enumerate(addresses) if self.arguments[x] != i]
        self.complete = all([address % ALIGNMENT == 0 for address in addresses])
        self.tensors, self.table = tensors, []
        self.stream = self._place(None)
        self.memory: Dict[int, Place] = {}  # by address, the last allocation there: what is freed is allocated again
        self.allocations: Dict[Place, Tuple] = {}
        self.readers: Dict[Place, List[int]] = {}  # the launches that an allocation is passed to
        self.launches: List[Launch] = []

    def __enter__(self) -> "_Recording":
        thread.recording = self
        return super().__enter__()

    def __exit__(self, *error) -> None:
        thread.recording = None
        super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in _ALLOCATE:
            self.memory[result.data_ptr()] = place = self._place(None)
            self.allocations[place] = place, tuple(result.shape), result.dtype
            self.readers[place] = []
            self.complete &= result.is_contiguous() and result.numel() > 0 and result.device == self.tensors[0].device
        else:
            self.complete &= func.overloadpacket in _VIEW
        return result

    def launched(self, compiled: Any, grid: Tuple[int, ...], arguments: Tuple) -> None:
        """``compiled`` is None if it was not when the launch was asked for."""
        made = []
        places = [self._argument(value, made) for value in arguments]
        if compiled is None or None in places:
            self.complete = False
            return
        grid, kernel = map(self._place, grid), (compiled.function, compiled.packed_metadata, None, None, None)
        places = (*grid, self.stream, *map(self._place, kernel), *places)
        self.launches.append(Launch([], made, compiled.run, itemgetter(*places), []))

    def _argument(self, value: Any, made: List) -> Optional[Place]:
        """Its place; None if nobody knows what it would be in another call."""
        if _is_fixed(value):
            return self._place(value)
        make = None
        if isinstance(value, Tensor):
            place, offset = self._whose(value)
            self.readers.get(place, []).append(len(self.launches))
            if not offset:
                return place
            make = _moved(place, offset)
        elif isinstance(value, TensorDescriptor):
            place = self._argument(value.base, made)
            make = place is not None and _descriptor(place, value)
        elif isinstance(value, tuple) and len(value) > 1:  # of one place, itemgetter makes no tuple
            places = [self._argument(part, made) for part in value]
            make = None not in places and itemgetter(*places)
        if not make:
            return None
        made.append((self._place(None), make))
        return made[-1][0]

    def _whose(self, tensor: Tensor) -> Tuple[Optional[Place], int]:
        """The allocation that ``tensor`` lies in, and how many bytes from its start; or the argument that it is.

        Asked by its storage, which is alive: where it starts, memory that was freed before may have ended."""
        start = tensor.untyped_storage().data_ptr()
        if start in self.memory:
            return self.memory[start], tensor.data_ptr() - start
        return self.arguments.get(tensor.data_ptr()), 0

    def _place(self, value: Any) -> Place:
        """A new one, for ``value``."""
        self.table.append(value)
        return len(self.tensors) + len(self.table) - 1

    def record(self, results: Tuple) -> Record:
        places = [None if result is None else self._result(result) for result in results]
        if not self.complete or not self.launches:
            return Record([], 0, [], [], [], tuple)
        for place, readers in self.readers.items():
            self.launches[min(readers, default=0)].allocations.append(self.allocations[place])
            if place not in places:
                self.launches[max(readers, default=0)].freed.append(place)
        make_results = getattr(type(results), "_make", tuple)
        return Record(self.table, self.stream, self.same, self.launches, places, make_results)

    def _result(self, tensor: Tensor) -> Optional[Place]:
        place, _ = self._whose(tensor)
        if place in self.allocations:
            whole = tensor.is_contiguous() and (tuple(tensor.shape), tensor.dtype) == self.allocations[place][1:]
        else:
            whole = place is not None and tensor is self.tensors[place]
        self.complete &= whole
        return place


def _is_fixed(value: Any) -> bool:
    """Whether it is part of the form, or follows from it."""
    return isinstance(value, (int, float, str, type(None))) or (isinstance(value, tuple) and all(map(_is_fixed, value)))


def _moved(place: Place, offset: int) -> Callable[[List], int]:
    return lambda table: table[place] + offset


class _Base(NamedTuple):
    """What is asked of a descriptor's tensor. Not the tensor, whose memory would then be in use until the call ends."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


def _descriptor(place: Place, like: TensorDescriptor) -> Callable[[List], TensorDescriptor]:
    dtype = like.base.dtype
    like = replace(like, base=_Base(0, dtype))
    return lambda table: replace(like, base=_Base(table[place], dtype))
