"""What a call does on the device: what it allocates, what it launches, and whose address each pointer of a launch is.

A record must hold all of that, and hold in other calls. So one cannot be replayed, and its code runs each time, if it
computes by PyTorch's ops instead of :func:`launch`, passes an address inside of memory that several arguments share,
which may be that of any, or returns anything but whole allocations and arguments. And no call is replayed whose
arguments are less aligned, or two where they were one.
"""

from dataclasses import replace
from functools import reduce
from operator import itemgetter, or_
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from ..tiling import cdiv
from .launch import Launcher, thread

Tensor = torch.Tensor
Place = int
"""Where something stands in a call's table: the address of an argument or of an allocation, or what launches take."""

ALIGNMENT = 16
"""Bytes. Whether an address is a multiple is all that code and compiled kernels depend on."""

AT_ONCE, SMALL = 24 * 2**20, 8 * 2**20
"""Bytes of the one allocation that a replay makes in the place of many, which would take the host longer: for all that
ends with the call, if that fits in AT_ONCE, else for the smallest of it, up to SMALL. What is left is allocated when a
launch is first given it, and freed after the last."""

PIECE = 512
"""Bytes. PyTorch gives out a GPU's memory in multiples of them, and so does a replay in that allocation."""


class Launch(NamedTuple):
    """In the order in which it happens; the last are allocations that nobody reads any more."""

    allocations: List[Tuple[Place, Tuple[int, ...], torch.dtype]]
    moved: List[Tuple[Place, Place, int]]  # an address that is another's plus so many bytes
    made: List[Tuple[Place, Callable[[List], Any]]]  # of what stands in the table by then
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
        if reduce(or_, addresses) % ALIGNMENT:
            return None
        for i, j in self.same:
            if addresses[i] != addresses[j]:
                return None
        table, held = addresses + self.table, {}
        device = tensors[0].device
        table[self.stream] = driver.active.get_current_stream(device.index)
        for allocations, moved, made, run, arguments, freed in self.launches:
            for place, shape, dtype in allocations:
                held[place] = tensor = torch.empty(*shape, dtype=dtype, device=device)
                table[place] = tensor.data_ptr()
            for place, base, offset in moved:
                table[place] = table[base] + offset
            for place, make in made:
                table[place] = make(table)
            run(*arguments(table))
            for place in freed:
                del held[place]
        count = len(tensors)
        return self.make_results(
            [None if place is None else tensors[place] if place < count else held[place] for place in self.results]
        )


_aten = torch.ops.aten
_ALLOCATE = {_aten.empty, _aten.empty_like, _aten.new_empty}
_VIEW = {_aten.alias, _aten.view, _aten.transpose, _aten.slice, _aten.detach}


class Recording(TorchDispatchMode):
    """While entered, notes what this thread allocates and launches."""

    def __init__(self, tensors: List[Tensor]):
        super().__init__()
        addresses = [tensor.data_ptr() for tensor in tensors]
        self.arguments: Dict[int, Place] = {}  # by address
        for place, address in enumerate(addresses):
            self.arguments.setdefault(address, place)
        self.owners: Dict[int, Optional[Place]] = {}  # by address of their storage, if it is no other argument's
        for tensor, address in zip(tensors, addresses):
            start, place = tensor.untyped_storage().data_ptr(), self.arguments[address]
            self.owners[start] = place if self.owners.get(start, place) == place else None
        self.same = [(self.arguments[x], i) for i, x in enumerate(addresses) if self.arguments[x] != i]
        self.complete = all([address % ALIGNMENT == 0 for address in addresses])
        self.tensors, self.table = tensors, []
        self.stream = self._place(None)
        self.memory: Dict[int, Place] = {}  # by address, the last allocation there: what is freed is allocated again
        self.allocations: Dict[Place, Tuple] = {}
        self.bytes: Dict[Place, int] = {}
        self.readers: Dict[Place, List[int]] = {}  # the launches that an allocation is passed to
        self.launches: List[Launch] = []

    def __enter__(self) -> "Recording":
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
            self.bytes[place] = cdiv(result.nbytes, PIECE) * PIECE
            self.readers[place] = []
            self.complete &= result.numel() > 0 and result.device == self.tensors[0].device
        else:
            self.complete &= func.overloadpacket in _VIEW
        return result

    def launched(self, launcher: Optional[Launcher], grid: Tuple[int, ...], arguments: Tuple) -> None:
        """``launcher`` is None if the kernel was not compiled when the launch was asked for."""
        moved, made = [], []
        places = [self._argument(value, moved, made) for value in arguments]
        if launcher is None or None in places:
            self.complete = False
            return
        places = (*map(self._place, grid), self.stream, *map(self._place, launcher.between), *places)
        self.launches.append(Launch([], moved, made, launcher.function, itemgetter(*places), []))

    def _argument(self, value: Any, moved: List, made: List) -> Optional[Place]:
        """Its place; None if nobody knows what it would be in another call."""
        if _is_fixed(value):
            return self._place(value)
        make = None
        if isinstance(value, Tensor):
            if value.numel() == 0:
                return self._place(0)  # PyTorch's address of nothing, whatever it is a part of
            place, offset = self._whose(value)
            if place in self.readers:
                self.readers[place].append(len(self.launches))
            if not offset:
                return place
            moved.append((self._place(None), place, offset))
            return moved[-1][0]
        elif isinstance(value, TensorDescriptor):
            place = self._argument(value.base, moved, made)
            make = place is not None and _descriptor(place, value)
        elif isinstance(value, tuple) and len(value) > 1:  # of one place, itemgetter makes no tuple
            places = [self._argument(part, moved, made) for part in value]
            make = None not in places and itemgetter(*places)
        if not make:
            return None
        made.append((self._place(None), make))
        return made[-1][0]

    def _whose(self, tensor: Tensor) -> Tuple[Optional[Place], int]:
        """The allocation that ``tensor`` lies in, and how many bytes from its start; or the argument that it is. Its
        storage says which: at its own address, memory that was freed meanwhile may have begun."""
        start = tensor.untyped_storage().data_ptr()
        if start in self.memory:
            return self.memory[start], tensor.data_ptr() - start
        place = self.arguments.get(tensor.data_ptr(), self.owners.get(start))
        return place, 0 if place is None else tensor.data_ptr() - self.tensors[place].data_ptr()

    def _place(self, value: Any) -> Place:
        """A new one, for ``value``."""
        self.table.append(value)
        return len(self.tensors) + len(self.table) - 1

    def record(self, results: Tuple) -> Record:
        places = [None if result is None else self._result(result) for result in results]
        if not self.complete or not self.launches:
            return Record([], 0, [], [], [], tuple)
        shared = self._share([place for place in self.allocations if place not in places])
        for place in self.allocations.keys() - shared:
            readers = self.readers[place]
            self.launches[min(readers, default=0)].allocations.append(self.allocations[place])
            if place not in places:
                self.launches[max(readers, default=0)].freed.append(place)
        make_results = getattr(type(results), "_make", tuple)
        return Record(self.table, self.stream, self.same, self.launches, places, make_results)

    def _share(self, temporary: List[Place]) -> List[Place]:
        """Has them, or the smallest of them, lie side by side in one allocation; returns which."""
        whole, end, shared = self._place(None), 0, []
        most = AT_ONCE if sum([self.bytes[place] for place in temporary]) <= AT_ONCE else SMALL
        for place in sorted(temporary, key=self.bytes.get):
            if end + self.bytes[place] <= most:
                shared.append((place, whole, end))
                end += self.bytes[place]
        if shared:
            self.launches[0].allocations.append((whole, (end,), torch.uint8))
            self.launches[0].moved[:0] = shared
        return [place for place, *_ in shared]

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
