"""A layer's two passes as CUDA graphs: forward, and what checkpointing does in backward.

All recordings on a device share their memory: what a layer reads and returns is copied in and out, and everything else
is overwritten by the next layer. Only what forward keeps for backward (see ``kept``) is a recording's own, on the
device or, offloaded, on the host.
"""

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Optional

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge
from torch.utils import _pytree as pytree

from .kept import Kept
from .offload import Claim, Offloaded, Places

Tensor = torch.Tensor


class Device:
    """What the recordings of one device share: a stream to record on, a pool of memory, buffers for what goes in and
    out, places for what is offloaded."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.generator = torch.cuda.default_generators[device.index]
        self.buffers, self.places = Buffers(), Places(device)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """A function that does again on the device what ``work`` launches now."""
        graph = torch.cuda.CUDAGraph()
        # Other threads, which load data or watch a network, may go on.
        capture = torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local")
        with _nothing_collected(), capture:
            work()
        return graph.replay


class Buffers:
    """Tensors by what they are for, and what they are: layers that are alike have the same."""

    def __init__(self):
        self._tensors: dict[tuple, Tensor] = {}
        self._inputs: dict[tuple, Input] = {}

    def like(self, tensor: Tensor, *purpose: Any) -> Tensor:
        key = (*purpose, tensor.shape, tensor.dtype, tensor.device)
        if key not in self._tensors:
            self._tensors[key] = torch.empty_like(tensor, requires_grad=False)
        return self._tensors[key]

    def input(self, tensor: Tensor, index: int) -> "Input":
        key = (index, tensor.shape, tensor.dtype, tensor.device)
        if key not in self._inputs:
            self._inputs[key] = Input(torch.empty_like(tensor))
        return self._inputs[key]


class Input:
    """A buffer for what every layer of a model is called with, such as positions: the first one reads it for all.

    What a call has read is among the tensors that autograd saves for it. So until the backward of that call is over,
    the tensor can change only by what counts its version up, or gradients are wrong without graphs too. After that it
    is read again: one that is there from step to step may be filled by a kernel or a graph, which count nothing.
    """

    def __init__(self, buffer: Tensor):
        self.buffer = buffer
        self._tensor: Callable[[], Optional[Tensor]] = lambda: None
        self._reader: Callable[[], Optional[Claim]] = lambda: None
        self._version = 0

    def read(self, tensor: Tensor, claim: Claim) -> None:
        """For the call with this claim."""
        reader = self._reader()
        if reader is None or reader.over or self._tensor() is not tensor or self._version != tensor._version:
            self.buffer.copy_(tensor)
            self._tensor, self._reader, self._version = weakref.ref(tensor), weakref.ref(claim), tensor._version


class Recording:
    """A layer's two graphs, and the buffers that they read and write. What comes out takes the place of what went in:
    the result that of hidden_states, their gradient that of the result's.

    Args:
        layer: the bound ``__call__`` of the layer.
        hidden_states: its input in one call, of any values.
        values, tree: its other arguments, flattened.
        kept: what the layer keeps from forward to backward, called before in this form.
        device: what records.
    """

    def __init__(
        self,
        layer: Callable,
        hidden_states: Tensor,
        values: list,
        tree: pytree.TreeSpec,
        kept: Kept,
        device: Device,
    ):
        self.generator, self.kept, self.keeps = device.generator, kept, bool(kept.tensors)
        self._offloaded = Offloaded(kept, device.places) if kept.offloaded else None
        self._claim: Callable[[], Optional[Claim]] = lambda: None
        self.parameters = [parameter for parameter in layer.__self__.parameters() if parameter.requires_grad]
        self.state = device.buffers.like(hidden_states, "state")
        self.grad = device.buffers.like(hidden_states, "grad")
        self.grads = [device.buffers.like(each, "grad of", i) for i, each in enumerate(self.parameters)]
        self.inputs = {i: device.buffers.input(v, i) for i, v in enumerate(values) if isinstance(v, Tensor)}
        self.used: list[bool] = []
        read = [self.inputs[i].buffer if i in self.inputs else value for i, value in enumerate(values)]
        args, keywords = pytree.tree_unflatten(read, tree)
        kind, casts = hidden_states.device.type, casts_in_force(hidden_states.device.type)
        wants_grad = hidden_states.requires_grad  # hidden_states itself would hold the layers before

        def run(state: Tensor) -> Tensor:
            with torch.autocast(**casts):
                return layer(state, *args, **keywords)

        def forward() -> None:
            with torch.no_grad(), kept.forward():
                self.state.copy_(run(self.state))

        def backward() -> None:
            state = self.state.detach().requires_grad_(wants_grad)
            with torch.enable_grad(), _fresh(layer.__self__, self.parameters) as leaves:
                with kept.recomputation():
                    # Of the result only where it came from: nothing reads it, and its memory serves backward.
                    end = get_gradient_edge(run(state))
                # Without autocast, as loss.backward() is called.
                with torch.autocast(kind, enabled=False):
                    wanted = [*leaves, state] if state.requires_grad else leaves
                    grads = torch.autograd.grad(end, wanted, self.grad, allow_unused=True)
            self.used = [grad is not None for grad in grads[: len(leaves)]]
            buffers = zip([*self.grads, self.grad], grads)
            _copy_all([(buffer, grad) for buffer, grad in buffers if grad is not None])

        try:
            # The one that takes more memory comes first: what it leaves in the pool then holds the other.
            self._backward, self._forward = device.record(backward), device.record(forward)
        except torch.OutOfMemoryError:
            raise  # by its own name, for those who lower something and go on
        except Exception as error:
            raise RuntimeError(
                f"{type(layer.__self__).__name__} could not be recorded as a CUDA graph, perhaps because it waits for "
                f"the GPU; use model.gradient_checkpointing_enable() instead. {error}"
            ) from error

    def read(self, hidden_states: Tensor, inputs: Iterable[Tensor], claim: Claim) -> None:
        self.state.copy_(hidden_states)
        for each, tensor in zip(self.inputs.values(), inputs):
            each.read(tensor, claim)

    def forward(self, claim: Claim) -> None:
        """Of the call with this claim, whose inputs have been read."""
        if self._offloaded is not None:
            self._offloaded.make_room()
        self._forward()
        if self._offloaded is not None:
            self._offloaded.store(claim)

    def backward(self, claim: Claim) -> None:
        """Of the call with this claim, whose inputs have been read again."""
        if self._offloaded is not None:
            self._offloaded.fetch(claim)
        self._backward()

    @property
    def awaits_backward(self) -> bool:
        """Whether what is kept is that of a call whose backward is still to come."""
        claim = self._claim()
        return self.keeps and claim is not None and not claim.over

    def claim(self) -> Claim:
        """A call's, to what is kept from now on."""
        claim = Claim()
        self._claim = weakref.ref(claim)
        return claim

    def holds(self, claim: Claim) -> bool:
        """Whether what is kept is still that of the call with this claim."""
        return not self.keeps or self._claim() is claim


def casts_in_force(kind: str) -> dict[str, Any]:
    """The autocast in force on a kind of device, except that it keeps no casts: those would be of parameters as they
    were when a graph was recorded."""
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return {"device_type": kind, "enabled": enabled, "dtype": dtype, "cache_enabled": False}


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """What dies may wait for the GPU, as what is offloaded does, and nothing may while a graph is recorded."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _fresh(layer: nn.Module, parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """New parameters in the place of these, with the same memory.

    While an earlier forward waits for its backward, autograd has a node for each of its parameters, which belongs to
    the stream of that forward: a recording on another stream cannot touch it.
    """
    fresh = {parameter: nn.Parameter(parameter.detach()) for parameter in parameters}
    owners = [module._parameters for module in layer.modules()]
    held = [(owner, name, each) for owner in owners for name, each in owner.items() if each is not None]
    try:
        for owner, name, parameter in held:
            owner[name] = fresh.get(parameter, parameter)
        yield list(fresh.values())
    finally:
        for owner, name, parameter in held:
            owner[name] = parameter


def _copy_all(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """To the first of each pair from the second. A launch for each dtype: at once, they would take one a tensor."""
    for dtype in {to.dtype for to, _ in pairs}:
        torch._foreach_copy_(*map(list, zip(*(pair for pair in pairs if pair[0].dtype == dtype))))


class Replay(torch.autograd.Function):
    """A layer's call: its parameters are inputs, so their gradients go where those of any other layer go."""

    @staticmethod
    def forward(ctx, recording: Recording, values: list, hidden_states: Tensor, *parameters: Tensor) -> Tensor:
        ctx.recording, ctx.claim, ctx.offset = recording, recording.claim(), recording.generator.get_offset()
        inputs = [values[i] for i in recording.inputs]
        recording.read(hidden_states, inputs, ctx.claim)
        recording.forward(ctx.claim)
        ctx.save_for_backward(hidden_states, *inputs)
        return recording.state.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor) -> tuple:
        recording, generator = ctx.recording, ctx.recording.generator
        hidden_states, *inputs = ctx.saved_tensors
        if not recording.holds(ctx.claim):
            raise RuntimeError(
                "backward came a second time (retain_graph=True) after another forward, which has overwritten what was "
                "kept for it; let it come before that, or pass keep=() to enable_graphed_checkpointing"
            )
        recording.read(hidden_states, inputs, ctx.claim)
        recording.grad.copy_(grad_output)
        # What forward dropped has to be dropped again.
        offset = generator.get_offset()
        generator.set_offset(ctx.offset)
        recording.backward(ctx.claim)
        generator.set_offset(offset)
        ctx.claim.over = True
        results = [recording.grad if ctx.needs_input_grad[2] else None]
        results += [each if used else None for used, each in zip(recording.used, recording.grads)]
        present = [each for each in results if each is not None]
        copies = [torch.empty_like(each) for each in present]
        _copy_all([*zip(copies, present)])
        left = iter(copies)
        return None, None, *(None if each is None else next(left) for each in results)
