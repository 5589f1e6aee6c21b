"""Gradient checkpointing in which each pass over a decoder layer is one CUDA graph.

A decoder layer with 4-bit weights and LoRA is some 250 launches per training step, and a host needs longer to issue
them one by one than a GPU to run them. Recorded once, the layer's forward is a single launch, and so is what
checkpointing does in backward: forward again, then the gradients.

Nothing can be compiled or set up while a graph is recorded. So a layer is recorded when it is called in a form (shape,
dtype, trained parameters, ...) in which it has been through backward before; until then it is checkpointed as usual.
All recordings on a device share their memory: what a layer reads and returns is copied in and out, and everything else
is overwritten by the next layer.
"""

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Optional
from weakref import WeakKeyDictionary

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer

from .experts import kernel_of
from .kept_attention import Attention, KeptAttention

Tensor = torch.Tensor


def enable_graphed_checkpointing(model: nn.Module, variants: int = 4, keep_attention: bool = False) -> nn.Module:
    """Checkpoints every decoder layer of a model with CUDA graphs: less host time per step, the same numbers.

    Call it once the adapters are in place, instead of ``gradient_checkpointing_enable``. A Trainer must not enable
    checkpointing itself: ``TrainingArguments(gradient_checkpointing=False)``. It pays where batches have few different
    shapes. These are checkpointed as usual, with a warning: calls on a CPU, layers with hooks (those of FSDP, of
    ``device_map`` over several devices and of ``output_router_logits``, among others), and what comes after
    ``variants`` different forms of calls.

    Args:
        model: a Transformers model, or a PEFT model around one.
        variants: how many forms of calls are recorded for each layer. Calls differ in form if their shapes, dtypes,
            autocast, trained parameters or active adapters do, or if a parameter has moved.
        keep_attention: whether what PyTorch's ``scaled_dot_product_attention`` computes is kept from forward to
            backward, which then need not compute it again. Takes, for each token and layer, (2 * head_dim + 4) bytes a
            head in 16 bit: 8.1 KiB for Qwen3-30B-A3B, beside the 4 KiB that checkpointing itself keeps. Attention
            with dropout is computed again all the same.

    Returns:
        ``model``, changed in place.

    Raises:
        ValueError: ``model`` contains no Transformers model, or ``variants`` is less than 1.
        RuntimeError: in training, when a layer cannot be recorded, because it waits for the GPU, say.
    """
    if variants < 1:
        raise ValueError(f"variants must be at least 1, got {variants}")
    base = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if base is None:
        raise ValueError(f"model must be or contain a model of Transformers, got a {type(model).__name__}")
    checkpointed = GraphedCheckpoint(variants, keep_attention)
    base._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=checkpointed)
    return model


class GraphedCheckpoint:
    """What Transformers calls in place of ``torch.utils.checkpoint.checkpoint``."""

    def __init__(self, variants: int, keep_attention: bool):
        self.variants, self.keep_attention = variants, keep_attention
        self._known: WeakKeyDictionary[nn.Module, list[_Variant]] = WeakKeyDictionary()
        self._devices: dict[torch.device, _Device] = {}

    def __call__(self, function: functools.partial, hidden_states: Tensor, *args: Any) -> Any:
        """``function`` is a layer's bound ``__call__`` with its keyword arguments."""
        if not torch.is_grad_enabled():
            return function(hidden_states, *args)
        layer = function.func.__self__
        values, tree = pytree.tree_flatten((args, function.keywords))
        try:
            variant = self._variant(layer, _Call.of(layer, hidden_states, values, tree), hidden_states.device)
        except _NotRecordableError as reason:
            _warn_once(f"{type(layer).__name__} is checkpointed without CUDA graphs: {reason}")
            return checkpoint(function, hidden_states, *args, use_reentrant=False)
        if not variant.tried:
            self._warm_up(variant, function, hidden_states, *args)
            output = checkpoint(function, hidden_states, *args, use_reentrant=False)
            if isinstance(output, Tensor) and output.requires_grad and _meta(output)[:3] == _meta(hidden_states)[:3]:
                output.register_hook(variant.was_tried)
            return output
        if variant.recording is None:
            device = self._device(hidden_states.device)
            variant.recording = _Recording(function.func, hidden_states, values, tree, variant.attention, device)
        return _Replay.apply(variant.recording, values, hidden_states, *variant.recording.parameters)

    def _variant(self, layer: nn.Module, call: "_Call", device: torch.device) -> "_Variant":
        """The same for equal calls."""
        known = self._known.setdefault(layer, [])
        variant = next((variant for variant in known if variant.call == call), None)
        if variant is None:
            if len(known) == self.variants:
                raise _NotRecordableError(
                    f"it was called in more than {self.variants} forms; pack or pad sequences to few lengths"
                )
            attention = KeptAttention(self._device(device).buffers.like) if self.keep_attention else Attention()
            known.append(variant := _Variant(call, attention))
        return variant

    def _warm_up(self, variant: "_Variant", function: functools.partial, hidden_states: Tensor, *args: Any) -> None:
        """Compiles what forward runs when it keeps nothing for backward; leaves no trace in random numbers."""
        generators, casts = [hidden_states.device] if hidden_states.is_cuda else [], _casts(hidden_states.device.type)
        with torch.no_grad(), torch.random.fork_rng(generators), torch.autocast(**casts), variant.attention.forward():
            function(hidden_states.detach(), *args)

    def _device(self, device: torch.device) -> "_Device":
        if device not in self._devices:
            self._devices[device] = _Device(device)
        return self._devices[device]


@dataclass
class _Call:
    """Everything on which the launches of a layer depend, addresses included: equal calls can share a graph."""

    inputs: list
    tree: pytree.TreeSpec
    autocast: tuple
    state: list

    @classmethod
    def of(cls, layer: nn.Module, hidden_states: Tensor, values: list, tree: pytree.TreeSpec) -> "_Call":
        """Raises:
        _NotRecordableError: saying why.
        """
        kind = hidden_states.device.type
        if not _can_record(hidden_states.device):
            raise _NotRecordableError(f"it runs on {kind}")
        if any(isinstance(value, Tensor) and value.requires_grad for value in values):
            raise _NotRecordableError("it has an input besides hidden_states that requires a gradient")
        inputs = [_meta(value) if isinstance(value, Tensor) else value for value in (hidden_states, *values)]
        state = _state(layer)
        if not hidden_states.requires_grad and True not in state:
            raise _NotRecordableError("nothing in it or before it is trained")
        return cls(inputs, tree, (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)), state)


def _state(layer: nn.Module) -> list:
    """Of every module in a layer whether it trains, where its tensors lie and what its adapters do.

    Done for each call, so it walks as directly as it can.
    """
    state, modules = [], [layer]
    while modules:
        module = modules.pop()
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "_hf_hook" in module.__dict__
        ):
            raise _NotRecordableError(f"its {type(module).__name__} has hooks, which a graph would not call")
        state.append("trains" if module.training else "evaluates")
        for tensor in module._parameters.values():
            if tensor is not None:
                state += tensor.data_ptr(), tensor.dtype, tensor.requires_grad
        for tensor in module._buffers.values():
            if tensor is not None:
                state += tensor.data_ptr(), tensor.dtype
        if _has_adapters(type(module)):
            # As tuples: PEFT changes its lists in place, and a call that is kept must not change with them.
            state += tuple(module.active_adapters), tuple(module.merged_adapters), module.disable_adapters and "off"
            state += getattr(module, "scaling", {}).items()
        modules.extend(child for child in module._modules.values() if child is not None)
    return state


@functools.cache
def _has_adapters(kind: type) -> bool:
    return issubclass(kind, BaseTunerLayer)  # of abstract classes, and so not cheap


class _NotRecordableError(Exception):
    """A call that is checkpointed as usual."""


@dataclass
class _Variant:
    """Calls of one form. They are recorded once a backward of one has begun: by the next forward it is over, so kernels
    are compiled, and libraries have set up what they need on the threads that run them."""

    call: _Call
    attention: Attention
    tried: bool = False
    recording: Optional["_Recording"] = None

    def was_tried(self, grad: Tensor) -> None:
        self.tried = True


def _meta(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad


def _can_record(device: torch.device) -> bool:
    return device.type == "cuda"


class _Device:
    """What the recordings of one device share: a stream to record on, a pool of memory, buffers for what goes in and
    out."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.generator = torch.cuda.default_generators[device.index]
        self.buffers = _Buffers()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """A function that does again on the device what ``work`` launches now."""
        graph = torch.cuda.CUDAGraph()
        # Other threads, which load data or watch a network, may go on.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            work()
        return graph.replay


class _Buffers(dict):
    """Tensors by what they are for, and what they are: layers that are alike have the same."""

    def like(self, tensor: Tensor, *purpose: Any) -> Tensor:
        key = (*purpose, tensor.shape, tensor.dtype, tensor.device)
        if key not in self:
            self[key] = torch.empty_like(tensor, requires_grad=False)
        return self[key]


class _Recording:
    """A layer's two graphs, and the buffers that they read and write. What comes out takes the place of what went in:
    the result that of hidden_states, their gradient that of the result's.

    Args:
        layer: the bound ``__call__`` of the layer.
        hidden_states: its input in one call, of any values.
        values, tree: its other arguments, flattened.
        attention: that of the layer, called before in this form.
        device: what records.
    """

    def __init__(
        self,
        layer: Callable,
        hidden_states: Tensor,
        values: list,
        tree: pytree.TreeSpec,
        attention: Attention,
        device: _Device,
    ):
        self.generator, self.attention = device.generator, attention
        self.parameters = [parameter for parameter in layer.__self__.parameters() if parameter.requires_grad]
        self.state = device.buffers.like(hidden_states, "state")
        self.grad = device.buffers.like(hidden_states, "grad")
        self.grads = [device.buffers.like(each, "grad of", i) for i, each in enumerate(self.parameters)]
        self.values = [device.buffers.like(v, i) if isinstance(v, Tensor) else v for i, v in enumerate(values)]
        self.used: list[bool] = []
        args, keywords = pytree.tree_unflatten(self.values, tree)
        kind, casts = hidden_states.device.type, _casts(hidden_states.device.type)

        def run(state: Tensor) -> Tensor:
            with torch.autocast(**casts):
                return layer(state, *args, **keywords)

        def forward() -> None:
            with torch.no_grad(), attention.forward():
                self.state.copy_(run(self.state))

        def backward() -> None:
            state = self.state.detach().requires_grad_(hidden_states.requires_grad)
            with torch.enable_grad(), _fresh(layer.__self__, self.parameters) as leaves:
                with _for_gradients(layer.__self__), attention.recomputation():
                    # Of the result only where it came from: nothing reads it, and its memory serves backward.
                    end = get_gradient_edge(run(state))
                # Without autocast, as loss.backward() is called.
                with torch.autocast(kind, enabled=False):
                    wanted = [*leaves, state] if state.requires_grad else leaves
                    grads = torch.autograd.grad(end, wanted, self.grad, allow_unused=True)
            self.used = [grad is not None for grad in grads[: len(leaves)]]
            buffers = zip([*self.grads, self.grad], grads)
            torch._foreach_copy_(*map(list, zip(*(pair for pair in buffers if pair[1] is not None))))

        try:
            # The one that takes more memory comes first: what it leaves in the pool then holds the other.
            self.backward, self.forward = device.record(backward), device.record(forward)
        except torch.OutOfMemoryError:
            raise  # by its own name, for those who lower something and go on
        except Exception as error:
            raise RuntimeError(
                f"{type(layer.__self__).__name__} could not be recorded as a CUDA graph, perhaps because it waits for "
                f"the GPU; use model.gradient_checkpointing_enable() instead. {error}"
            ) from error

    def read(self, hidden_states: Tensor, values: list, kept: Iterable[Tensor] = ()) -> None:
        self.state.copy_(hidden_states)
        for buffer, value in zip(self.attention.tensors, kept):
            buffer.copy_(value)
        for buffer, value in zip(self.values, values):
            if isinstance(value, Tensor):
                buffer.copy_(value)


def _casts(kind: str) -> dict[str, Any]:
    """The autocast in force on a kind of device, except that it keeps no casts: those would be of parameters as they
    were when a graph was recorded."""
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return {"device_type": kind, "enabled": enabled, "dtype": dtype, "cache_enabled": False}


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


def _for_gradients(layer: nn.Module) -> AbstractContextManager:
    """A Qwen3-MoE's layer ends by adding the experts' result, so no gradient reads it and it need not be computed."""
    experts = getattr(layer.mlp, "experts", None) if isinstance(layer, Qwen3MoeDecoderLayer) else None
    if isinstance(experts, BaseTunerLayer):
        experts = experts.get_base_layer()
    return getattr(experts and kernel_of(experts), "for_gradients", nullcontext)()


class _Replay(torch.autograd.Function):
    """A layer's call: its parameters are inputs, so their gradients go where those of any other layer go."""

    @staticmethod
    def forward(ctx, recording: _Recording, values: list, hidden_states: Tensor, *parameters: Tensor) -> Tensor:
        ctx.recording, ctx.offset = recording, recording.generator.get_offset()
        recording.read(hidden_states, values)
        recording.forward()
        inputs = [value if isinstance(value, Tensor) else None for value in values]
        ctx.save_for_backward(hidden_states, *inputs, *(each.clone() for each in recording.attention.tensors))
        return recording.state.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor) -> tuple:
        recording, generator = ctx.recording, ctx.recording.generator
        hidden_states, *saved = ctx.saved_tensors
        inputs = len(recording.values)
        recording.read(hidden_states, saved[:inputs], saved[inputs:])
        recording.grad.copy_(grad_output)
        # What forward dropped has to be dropped again.
        offset = generator.get_offset()
        generator.set_offset(ctx.offset)
        recording.backward()
        generator.set_offset(offset)
        results = [recording.grad if ctx.needs_input_grad[2] else None]
        results += [each if used else None for used, each in zip(recording.used, recording.grads)]
        present = [each for each in results if each is not None]
        copies = [torch.empty_like(each) for each in present]
        torch._foreach_copy_(copies, present)
        left = iter(copies)
        return None, None, *(None if each is None else next(left) for each in results)


@functools.cache
def _warn_once(line: str) -> None:
    warnings.warn(line, stacklevel=4)
