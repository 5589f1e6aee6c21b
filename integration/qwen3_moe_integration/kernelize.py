"""Swaps the kernel into models: into one that is loaded, or through Transformers while a model loads.

``kernels.kernelize`` gives a module the ``forward`` of a kernel layer and leaves everything else, so weights,
``state_dict`` and the router's hooks stay as they were. It is called directly: Transformers' own wrapper accepts one
range of ``kernels`` versions only, and keeps quiet about a layer for which it finds no kernel.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from kernels import Mode, kernelize, register_kernel_mapping, replace_kernel_forward_from_hub, use_kernel_mapping
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts, Qwen3MoeSparseMoeBlock

from .experts import EXPERTS_IMPLEMENTATION, experts_function
from .lora import adopt
from .source import KernelLayer, KernelSource

LAYERS = (Qwen3MoeSparseMoeBlock, Qwen3MoeExperts)
MODES = {"training": Mode.TRAINING | Mode.TORCH_COMPILE, "inference": Mode.INFERENCE | Mode.TORCH_COMPILE}
FROM_HUB = KernelSource()


def kernelize_model(model: nn.Module, mode: str = "training", kernel: KernelSource = FROM_HUB) -> nn.Module:
    """Runs the experts of a loaded Qwen3-MoE model on the kernel.

    Works before and after PEFT wraps the model, and lasts through ``train()`` and ``eval()``. Weights and
    ``state_dict`` do not change. LoRA of the experts runs on the kernel too.

    Args:
        model: a Qwen3-MoE model, or a module that contains one.
        mode: "training" or "inference"; a model kernelized for training generates as well.
        kernel: where the kernel comes from.

    Returns:
        ``model``, changed in place.

    Raises:
        ValueError: ``mode`` is neither of the two, ``model`` has no Qwen3-MoE layer, or the kernel cannot compute
            one of its layers. The model is unchanged then.
        TypeError: ``kernel`` is no :class:`KernelSource`.
    """
    if mode not in MODES:
        raise ValueError(f'mode must be "training" or "inference", got {mode!r}')
    layers = [module for module in model.modules() if isinstance(module, LAYERS)]
    if not layers:
        raise ValueError(
            f"model must contain a Qwen3MoeSparseMoeBlock, got a {type(model).__name__} without one; other "
            f'Mixture-of-Experts models take experts_implementation="{EXPERTS_IMPLEMENTATION}" when they load'
        )
    _check_supported(layers, kernel)
    _make_extensible()
    adopt(model)
    # One layer serves all devices, so it does not matter where the weights lie at the moment.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with use_kernel_mapping(_mapping(kernel), inherit_mapping=False), _beneath_hooks(layers):
        kernelize(_Only(layers), mode=MODES[mode], device=device, use_fallback=False)
    if any(getattr(module, "use_kernels", False) for module in model.modules()):
        # Transformers kernelizes such a model again, from what is registered, whenever it changes to train or eval.
        register_kernel_mapping(_mapping(kernel))
    return model


def register(kernel: KernelSource = FROM_HUB) -> None:
    """Makes the kernel known to Transformers, for models that are loaded after this call.

    ``from_pretrained(..., use_kernels=True)`` then swaps it into Qwen3-MoE, and
    ``from_pretrained(..., experts_implementation="qwen3_moe_fused")`` runs on it the experts of every model whose
    experts follow Transformers' interface. The kernel is loaded here, since later Transformers would say nothing of
    a kernel that it could not load.
    """
    function = experts_function(_load(kernel))
    _make_extensible()
    register_kernel_mapping(_mapping(kernel))
    ExpertsInterface.register(EXPERTS_IMPLEMENTATION, function)


def registered_experts() -> Callable:
    """The experts function that Transformers knows: of the Hub's kernel, unless :func:`register` was called before."""
    if EXPERTS_IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS:
        register()
    return ALL_EXPERTS_FUNCTIONS[EXPERTS_IMPLEMENTATION]


def _check_supported(layers: list, kernel: KernelSource) -> None:
    unsupported_reason = _load(kernel).unsupported_reason
    for layer in layers:
        reason = unsupported_reason(layer) if isinstance(layer, Qwen3MoeExperts) else None
        if reason is not None:
            raise ValueError(f"model has a {type(layer).__name__} that the kernel cannot compute: {reason}")


def _load(kernel: KernelSource) -> ModuleType:
    if not isinstance(kernel, KernelSource):
        raise TypeError(f"kernel must be a KernelSource, got {kernel!r}")
    return kernel.load()


def _make_extensible() -> None:
    """Transformers names no kernel layer for these classes; without a name ``kernelize`` passes them by."""
    for layer in LAYERS:
        replace_kernel_forward_from_hub(layer, layer.__name__)


def _mapping(kernel: KernelSource) -> dict:
    """The layers can train and be compiled, and every lesser mode falls back to such a layer."""
    return {
        layer.__name__: {
            device: {Mode.TRAINING | Mode.TORCH_COMPILE: KernelLayer(kernel, layer.__name__)}
            for device in ("cuda", "cpu")
        }
        for layer in LAYERS
    }


@contextmanager
def _beneath_hooks(layers: list) -> Iterator[None]:
    """Accelerate's offloading and dispatch are a ``forward`` on the instance too; they stay outside the new one."""
    hooked = [(layer, layer.forward) for layer in layers if hasattr(layer, "_hf_hook")]
    yield
    for layer, forward in hooked:
        layer._old_forward, layer.forward = layer.forward, forward


class _Only(nn.Module):
    """Shows ``kernelize`` these layers and none inside or beside them.

    It resets every other layer it knows to that layer's own ``forward``, and so would take out other kernels.
    """

    def __init__(self, layers: list):
        super().__init__()
        self.layers = layers

    def named_modules(self, *args, **kwargs) -> Iterator[tuple]:
        return ((str(i), layer) for i, layer in enumerate(self.layers))
