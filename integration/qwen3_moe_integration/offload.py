"""What recorded layers keep waits for backward in host memory, and takes the GPU's of two layers, not of all.

Graphs write and read at fixed addresses. So those of a layer have one of two places on the device, and layers that
follow each other have different ones. While a layer computes, the copies for its neighbour run beside it:

    forward     layer i writes its place            what i - 1 left in the other goes to the host
    backward    layer i reads its place             what i - 1 left on the host comes back to the other

The last two layers find theirs where forward left it. What a layer left goes to the host only once another layer
follows, in either pass. After the last one comes the loss, and a loss that asks for a number, such as that of its
tokens, has that copied by the same engine: behind the copy of a layer the host would wait for it, and the GPU for the
host.

One stream makes all copies, in the order in which they are asked for; it and the stream of the layers wait for each
other by events, and the host for neither.
"""

import mmap
import weakref
from collections.abc import Callable
from typing import Optional

import torch

from .kept import Kept

Tensor = torch.Tensor

ALIGNMENT = 512
"""In bytes, of each tensor in a place: that of PyTorch's allocator, on which kernels may rely."""


class Claim:
    """A call's, to what its forward kept. Dies with the graph of its call, which results of the call may hold longer
    than until its backward is over."""

    over = False
    offloaded: Optional["Offloaded"] = None
    """Where what it kept waits, if not in the memory of its recording."""
    before: Callable[[], Optional["Claim"]] = staticmethod(lambda: None)
    """That of the call before, of those that are offloaded: the next in backward."""


class Place:
    """Memory on the device that recordings take in turn.

    Attributes:
        holder: the claim whose call has its data here, or will once ``written`` has happened.
        written: what has to happen before they are read; None before anything was written.
        left: what has to happen before others are written over them, the last copy.
    """

    def __init__(self, size: int, device: torch.device):
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.holder: Callable[[], Optional[Claim]] = lambda: None
        self.written: Optional[torch.cuda.Event] = None
        self.left: Optional[torch.cuda.Event] = None


class Places:
    """Of one device: for each size two, and the stream that copies."""

    def __init__(self, device: torch.device):
        self.device = device
        self._streams = torch.get_device_module(device)
        self.copies = self._streams.Stream(device)
        self.last: Callable[[], Optional[Claim]] = lambda: None
        """The claim of the last forward."""
        self._put_off: Callable[[], Optional[Claim]] = lambda: None
        """That of a call whose data are still to go to the host."""
        self._places: dict[int, tuple[Place, Place]] = {}

    def turn(self, size: int) -> Place:
        """The place of ``size`` bytes for the recording of the call that comes next: not that of the call before."""
        if size not in self._places:
            self._places[size] = Place(size, self.device), Place(size, self.device)
        first, second = self._places[size]
        last = self.last()
        return second if last is not None and last.offloaded.place is first else first

    def put_off(self, claim: Claim) -> None:
        """Until the next layer follows: then what its call kept goes to the host."""
        self._put_off = weakref.ref(claim)

    def catch_up(self) -> None:
        """Before another layer is asked for."""
        claim, self._put_off = self._put_off(), lambda: None
        if claim is not None:  # or nobody will read it
            claim.offloaded.to_host()

    def asked(self) -> torch.cuda.Event:
        """That of all that was asked of the stream on which layers run."""
        return self._streams.current_stream(self.device).record_event()

    def wait(self, event: Optional[torch.cuda.Event]) -> None:
        """Has the stream on which layers run wait for it."""
        if event is not None:
            self._streams.current_stream(self.device).wait_event(event)

    def copy(self, to: Tensor, source: Tensor, after: torch.cuda.Event) -> torch.cuda.Event:
        """Its own event."""
        self.copies.wait_event(after)
        with self._streams.stream(self.copies):
            to.copy_(source, non_blocking=True)
        return self.copies.record_event()


class Offloaded:
    """What one recording keeps, in a place on the device and, for as long as others have that, on the host.

    Args:
        kept: has called the layer once without gradients; the memory made for what of it is offloaded is given up.
        places: of the device.

    Raises:
        RuntimeError: there is not enough host memory.
    """

    def __init__(self, kept: Kept, places: Places):
        starts, size = [], 0
        for tensor in kept.offloaded:
            starts.append(size)
            size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        self.places, self.place = places, places.turn(size)
        self._host = self._pinned(size) if self.place.memory.is_cuda else torch.empty_like(self.place.memory)
        left = iter(starts)
        kept.move(lambda tensor: _like(tensor, self.place.memory[next(left) :]))

    def make_room(self) -> None:
        """Before forward's graph writes to the place."""
        self.places.catch_up()
        self.places.wait(self.place.left)

    def store(self, claim: Claim) -> None:
        """After forward's graph, for the call with this claim."""
        claim.offloaded, claim.before = self, self.places.last
        self.place.holder = self.places.last = weakref.ref(claim)
        self.place.written = self.places.asked()
        self.places.put_off(claim)

    def to_host(self) -> None:
        self.place.left = self.places.copy(self._host, self.place.memory, after=self.place.written)

    def fetch(self, claim: Claim) -> None:
        """Before backward's graph reads the place, for the call with this claim, whose forward was the last here. What
        the call before kept is on its way while that graph runs."""
        self.places.catch_up()
        self._fill(claim)
        self.places.wait(self.place.written)
        before = claim.before()
        # While its backward is to come, its recording serves no other call.
        if before is not None and not before.over and before.offloaded.place is not self.place:
            before.offloaded._fill(before)

    def _fill(self, claim: Claim) -> None:
        """Has the data of ``claim``, which are on the host, in the place too."""
        if self.place.holder() is not claim:
            self.place.holder = weakref.ref(claim)
            filled = self.places.copy(self.place.memory, self._host, after=self.places.asked())
            self.place.written = self.place.left = filled

    def _pinned(self, size: int) -> Tensor:
        """Host memory that copies reach without the host. It and the place stay until no copy uses them any more.

        PyTorch's pinned memory would be a power of two. A process that is forked off, to load data, gets none of it: it
        would get a copy.
        """
        memory = mmap.mmap(-1, max(size, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_DONTFORK)
        host = torch.frombuffer(memory, dtype=torch.uint8)[:size]
        error = torch.cuda.cudart().cudaHostRegister(host.data_ptr(), max(size, 1), 0)
        if int(error):
            raise RuntimeError(
                f"{size} bytes of host memory could not be pinned for what a layer keeps ({error}); offload less, or "
                "keep less"
            )
        weakref.finalize(self, _release, host, self.place, self.places.copies).atexit = False
        return host


def _like(tensor: Tensor, memory: Tensor) -> Tensor:
    """What ``torch.empty_like`` gives, at the beginning of ``memory``."""
    strides = torch.empty_like(tensor, device="meta").stride()
    return memory[: tensor.nbytes].view(tensor.dtype).as_strided(tensor.shape, strides)


def _release(host: Tensor, place: Place, copies: torch.cuda.Stream) -> None:
    copies.synchronize()
    torch.cuda.cudart().cudaHostUnregister(host.data_ptr())
