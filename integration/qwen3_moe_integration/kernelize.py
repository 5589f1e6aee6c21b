"""Swaps the kernel into a model that is loaded.

``kernels.kernelize`` gives a module the ``forward`` of a kernel layer and leaves everything else, so weights,
``state_dict`` and the router's hooks stay as they were. It is called directly: Transformers' own wrapper accepts one
range of ``kernels`` versions only, and keeps quiet about a layer for which it finds no kernel.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Optional

import torch
from kernels import Mode, kernelize, register_kernel_mapping, use_kernel_mapping
from torch import nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from .experts import EXPERTS_IMPLEMENTATION
from .peft_hooks import adopt
from .registry import FROM_HUB, LAYERS, load_kernel, make_extensible, mapping
from .source import KernelSource

MODES = {"training": Mode.TRAINING | Mode.TORCH_COMPILE, "inference": Mode.INFERENCE | Mode.TORCH_COMPILE}


def kernelize_model(model: nn.Module, mode: str = "training", kernel: KernelSource = FROM_HUB) -> nn.Module:
    """Runs the experts of a loaded Qwen3-MoE model on the kernel.

    Works before and after PEFT wraps the model, and lasts through ``train()`` and ``eval()``. Weights and
    ``state_dict`` do not change. LoRA of the experts runs on the kernel too. So does a model that Unsloth has loaded;
    call this after its ``get_peft_model`` and before the first step, which compiles what it finds.

    Args:
        model: a Qwen3-MoE model, or a module that contains one.
        mode: "training" or "inference"; a model kernelized for training generates as well.
        kernel: where the kernel comes from.

    Returns:
        ``model``, changed in place.

    Raises:
        ValueError: ``mode`` is neither of the two, ``model`` has no Qwen3-MoE layer, or the kernel cannot compute
            one of its layers. The model is unchanged then.
        TypeError: ``model`` is no module, or ``kernel`` no :class:`KernelSource`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {model!r}")
    if mode not in list(MODES):  # a dict would ask for its hash
        raise ValueError(f'mode must be "training" or "inference", got {mode!r}')
    layers = [module for module in model.modules() if _layer_name(module)]
    if not layers:
        raise ValueError(
            f"model must contain a Qwen3MoeSparseMoeBlock, got a {type(model).__name__} without one; other "
            f'Mixture-of-Experts models take experts_implementation="{EXPERTS_IMPLEMENTATION}" when they load'
        )
    _check_supported(layers, kernel)
    for layer in layers:
        make_extensible(type(layer), _layer_name(layer))
    adopt(model)
    # One layer serves all devices, so it does not matter where the weights lie at the moment.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with use_kernel_mapping(mapping(kernel), inherit_mapping=False), _beneath_hooks(layers):
        kernelize(_Only(layers), mode=MODES[mode], device=device, use_fallback=False)
    if any(getattr(module, "use_kernels", False) for module in model.modules()):
        # Transformers kernelizes such a model again, from what is registered, whenever it changes to train or eval.
        register_kernel_mapping(mapping(kernel))
    return model


def _layer_name(module: nn.Module) -> Optional[str]:
    """The name of the kernel layer for a module; None if there is none.

    Told by the class's name: Unsloth compiles copies of Transformers' classes, and builds models of those.
    """
    names = {layer.__name__ for layer in LAYERS}
    return next((each.__name__ for each in type(module).__mro__ if each.__name__ in names), None)


def _check_supported(layers: list, kernel: KernelSource) -> None:
    unsupported_reason = load_kernel(kernel).unsupported_reason
    for layer in layers:
        reason = unsupported_reason(layer) if _layer_name(layer) == Qwen3MoeExperts.__name__ else None
        if reason is not None:
            raise ValueError(f"model has a {type(layer).__name__} that the kernel cannot compute: {reason}")


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
