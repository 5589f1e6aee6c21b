"""Gradient checkpointing in which each pass over a decoder layer is one CUDA graph.

A decoder layer with 4-bit weights and LoRA is some 250 launches per training step, and a host needs longer to issue
them one by one than a GPU to run them. Recorded once, the layer's forward is a single launch, and so is what
checkpointing does in backward: forward again, then the gradients.

Nothing can be compiled or set up while a graph is recorded. So a layer is recorded when it is called in a form (shape,
dtype, trained parameters, ...) in which it has been through backward before; until then it is checkpointed as usual.
``recording`` has the graphs themselves.
"""

import functools
import warnings
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Optional
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from .kept import KEEPABLE, Kept
from .layer_state import LayerState, NotRecordableError, State
from .recording import Device, Recording, Replay, casts_in_force
from .unmasked import leave_unmasked, without_empty_mask

Tensor = torch.Tensor

_NONE = -1
"""In the place of the number of a form: a call that is not recorded."""


def enable_graphed_checkpointing(
    model: nn.Module, variants: int = 4, keep: Collection[str] = (), offload: Collection[str] = ()
) -> nn.Module:
    """Checkpoints every decoder layer of a model with CUDA graphs: less host time per step, the same numbers.

    Call it once the adapters are in place, instead of ``gradient_checkpointing_enable``. A Trainer must not enable
    checkpointing itself: ``TrainingArguments(gradient_checkpointing=False)``. It pays where batches have few different
    shapes. These are checkpointed as usual, with a warning: calls on a CPU, those with tensors besides hidden states
    that lie on another device or want a gradient, layers with hooks (those of FSDP, of ``device_map`` over several
    devices and of ``output_router_logits``, among others), and what comes after ``variants`` different forms of calls.

    Args:
        model: a Transformers model, or a PEFT model around one.
        variants: how many forms of calls are recorded for each layer. Calls differ in form if their shapes, dtypes,
            autocast, trained parameters or active adapters do, or if a parameter has moved; where ranks share out the
            experts, also if another rank's do.
        keep: what is kept from forward to backward, which then need not compute it again: any of "attention",
            "experts", "o_proj", "k_proj", "v_proj" and "q_proj". It takes memory from the first recording on, for each
            form of call; a form's next forward uses it again, and so is checkpointed as usual, with a warning, while an
            earlier one waits for its backward. In 16 bit, for each token and layer, beside the 4 KiB of Qwen3-30B-A3B
            that checkpointing itself keeps:

            - "attention", what PyTorch's ``scaled_dot_product_attention`` computes without dropout: (2 * head_dim + 4)
              bytes a head, 8.1 KiB for Qwen3-30B-A3B.
            - "experts", what their backward reads, in layers of Qwen3-MoE on a kernel that has ``keeping``: for each of
              the top_k experts 4 bytes a column of its intermediate size, 2 a rank of its adapters, and an index: 24.5
              KiB for Qwen3-30B-A3B with adapters of rank 16.
            - "o_proj", "k_proj", "v_proj", "q_proj", the result and low-rank product of this linear layer of attention,
              in layers of Qwen3-MoE, where ``enable_fused_linear_lora`` has it computed: 2 bytes a column and a rank,
              for Qwen3-30B-A3B with adapters of rank 16 4.0, 1.0, 1.0 and 8.0 KiB. Of these, o_proj multiplies most
              for what it keeps.
        offload: what of ``keep`` waits for backward in host memory, which is pinned, and is copied there and back while
            other layers compute. For each form of call it takes the GPU's memory for two layers, not for all.

    Returns:
        ``model``, changed in place.

    Raises:
        ValueError: ``model`` contains no Transformers model, ``variants`` is less than 1, ``keep`` names something
            else, or ``offload`` what is not kept.
        RuntimeError: in training, when a layer cannot be recorded, because it waits for the GPU, say, or host memory
            cannot be pinned.
    """
    if variants < 1:
        raise ValueError(f"variants must be at least 1, got {variants}")
    if not set(keep) <= set(KEEPABLE):
        raise ValueError(f"keep must hold names among {', '.join(KEEPABLE)}, got {keep!r}")
    if not set(offload) <= set(keep):
        raise ValueError(f"offload must hold names among those of keep, {keep!r}, got {offload!r}")
    base = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if base is None:
        raise ValueError(f"model must be or contain a model of Transformers, got a {type(model).__name__}")
    checkpointed = GraphedCheckpoint(variants, tuple(keep), tuple(offload))
    base._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=checkpointed)
    leave_unmasked(base)
    return model


class GraphedCheckpoint:
    """What Transformers calls in place of ``torch.utils.checkpoint.checkpoint``."""

    drops_empty_masks = True  # see ``unmasked``

    def __init__(self, variants: int, keep: tuple[str, ...], offload: tuple[str, ...]):
        self.variants, self.keep, self.offload = variants, keep, offload
        self._known: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()
        self._devices: dict[torch.device, Device] = {}

    def __call__(self, function: functools.partial, hidden_states: Tensor, *args: Any) -> Any:
        """``function`` is a layer's bound ``__call__`` with its keyword arguments."""
        function = without_empty_mask(function)
        if not torch.is_grad_enabled():
            return function(hidden_states, *args)
        layer = function.func.__self__
        values, tree = pytree.tree_flatten((args, function.keywords))
        try:
            variant = self._variant(layer, hidden_states, values, tree)
        except NotRecordableError as reason:
            _warn_once(f"{type(layer).__name__} is checkpointed without CUDA graphs: {reason}")
            return checkpoint(function, hidden_states, *args, use_reentrant=False)
        if not variant.tried:
            self._warm_up(function, hidden_states, *args)
            output = checkpoint(function, hidden_states, *args, use_reentrant=False)
            if isinstance(output, Tensor) and output.requires_grad and _meta(output)[:3] == _meta(hidden_states)[:3]:
                output.register_hook(variant.was_tried)
            return output
        if variant.recording is None:
            kept = self._warm_up(function, hidden_states, *args) if self.keep else Kept(layer, ())
            device = self._device(hidden_states.device)
            variant.recording = Recording(function.func, hidden_states, values, tree, kept, device)
        return Replay.apply(variant.recording, values, hidden_states, *variant.recording.parameters)

    def _variant(self, layer: nn.Module, hidden_states: Tensor, values: list, tree: pytree.TreeSpec) -> "_Variant":
        """The same for equal calls.

        Raises:
            NotRecordableError: saying why this call can have none.
        """
        known = self._known.get(layer)
        if known is None:
            known = self._known[layer] = _Known(LayerState(layer))
        own, reason = _NONE, "it cannot be recorded on another of the ranks that share its experts"
        try:
            own = self._number(known, _Call.of(hidden_states, values, tree, known.state))
        except NotRecordableError as error:
            reason = str(error)  # the error itself would hold this frame, and so the call's tensors
        forms = (own,)
        if (exchange := known.state.exchange) is not None:
            # All ranks run a graph or none does: one that exchanges tokens has to meet its like.
            forms = tuple(number for (number,) in exchange.lengths.tell(forms))
        if _NONE in forms:
            raise NotRecordableError(reason)
        variant = next((variant for variant in known.variants if variant.forms == forms), None)
        if variant is None:
            self._check_number(known.variants)
            known.variants.append(variant := _Variant(own, forms))
        return variant

    def _number(self, known: "_Known", call: "_Call") -> int:
        """Of this form of call among those of the layer.

        Raises:
            NotRecordableError: saying why there can be no recording.
        """
        if call not in known.calls:
            self._check_number(known.calls)
            known.calls.append(call)
        own = known.calls.index(call)
        recordings = (variant.recording for variant in known.variants if variant.own == own)
        if any(recording is not None and recording.awaits_backward for recording in recordings):
            raise NotRecordableError("what it keeps is that of an earlier forward, which waits for its backward")
        return own

    def _check_number(self, forms: list) -> None:
        if len(forms) == self.variants:
            raise NotRecordableError(
                f"it was called in more than {self.variants} forms; pack or pad sequences to few lengths"
            )

    def _warm_up(self, function: functools.partial, hidden_states: Tensor, *args: Any) -> Kept:
        """Compiles what forward runs without gradients, and makes memory for what it keeps; leaves no trace in random
        numbers."""
        kept = Kept(function.func.__self__, self.keep, self.offload)
        generators = [hidden_states.device] if hidden_states.is_cuda else []
        casts = casts_in_force(hidden_states.device.type)
        with torch.no_grad(), torch.random.fork_rng(generators), torch.autocast(**casts), kept.forward():
            function(hidden_states.detach(), *args)
        return kept

    def _device(self, device: torch.device) -> Device:
        if device not in self._devices:
            self._devices[device] = Device(device)
        return self._devices[device]


@dataclass
class _Call:
    """Everything on which the launches of a layer depend, addresses included: equal calls can share a graph."""

    inputs: list
    tree: pytree.TreeSpec
    autocast: tuple
    state: State

    @classmethod
    def of(cls, hidden_states: Tensor, values: list, tree: pytree.TreeSpec, layer: LayerState) -> "_Call":
        """Raises:
        NotRecordableError: saying why.
        """
        kind = hidden_states.device.type
        if not _can_record(hidden_states.device):
            raise NotRecordableError(f"it runs on {kind}")
        tensors = [value for value in values if isinstance(value, Tensor)]
        if any(tensor.requires_grad for tensor in tensors):
            raise NotRecordableError("it has an input besides hidden_states that requires a gradient")
        if any(tensor.device != hidden_states.device for tensor in tensors):
            # The host may read it for what it launches, which is recorded once.
            raise NotRecordableError("it has an input on another device than hidden_states")
        inputs = [_meta(value) if isinstance(value, Tensor) else value for value in (hidden_states, *values)]
        state = layer.read()
        if not hidden_states.requires_grad and not state.is_trained:
            raise NotRecordableError("nothing in it or before it is trained")
        return cls(inputs, tree, (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)), state)


@dataclass
class _Variant:
    """Calls of one form. They are recorded once a backward of one has begun: by the next forward it is over, so kernels
    are compiled, and libraries have set up what they need on the threads that run them."""

    own: int
    """The number of the form among the layer's calls."""
    forms: tuple[int, ...]
    """That number on every rank, where ranks share out the layer's experts."""
    tried: bool = False
    recording: Optional[Recording] = None

    def was_tried(self, grad: Tensor) -> None:
        self.tried = True


@dataclass
class _Known:
    """Of a layer: how to read its state, and the forms in which it was called, here and together on all ranks."""

    state: LayerState
    calls: list[_Call] = field(default_factory=list)
    variants: list[_Variant] = field(default_factory=list)


def _meta(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad


def _can_record(device: torch.device) -> bool:
    return device.type == "cuda"


@functools.cache
def _warn_once(line: str) -> None:
    warnings.warn(line, stacklevel=4)
