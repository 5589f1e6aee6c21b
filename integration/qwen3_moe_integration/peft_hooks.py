"""The one place where PEFT itself is changed: which class wraps the experts, and what is saved of dropout.

Everything else goes through PEFT as it is. tests/integration/test_peft_hooks.py holds what is relied on.
"""

from typing import Any, Optional

from peft import LoraConfig
from peft.tuners.lora import layer as peft_layer
from peft.tuners.lora import model as peft_model
from torch import nn
from transformers.utils import logging

from . import lora, lora_four_bit

logger = logging.get_logger(__name__)

_dispatch, _to_dict = peft_model.dispatch_default, LoraConfig.to_dict


def install() -> None:
    """Makes ``get_peft_model``, ``add_adapter`` and ``from_pretrained`` wrap experts so that the kernel runs them."""
    peft_model.dispatch_default = dispatch
    LoraConfig.to_dict = to_dict


def dispatch(
    target: nn.Module, adapter_name: str, config: LoraConfig, parameter_name: Optional[str] = None, **kwargs: Any
) -> Optional[nn.Module]:
    """The last of PEFT's dispatchers: given a module or one parameter of it, the layer that adapts it."""
    wrapper = wrapper_class(target, parameter_name)
    if wrapper is not None:
        return wrapper(target, adapter_name, parameter_name, config, **kwargs)
    return _dispatch(target, adapter_name, config=config, parameter_name=parameter_name, **kwargs)


def adopt(model: nn.Module) -> None:
    """Has the wrappers of experts that others made act as those here: PEFT before this package was imported, or a
    library that reads 4-bit stacks in a way of its own."""
    for module in model.modules():
        wrapper = wrapper_class(module, module.parameter_name) if isinstance(module, peft_layer.ParamWrapper) else None
        if wrapper not in (None, type(module)):
            module.__class__ = wrapper
            module._get_in_out_features(module.get_base_layer())  # counts the experts anew


def wrapper_class(target: nn.Module, parameter_name: Optional[str]) -> Optional[type[lora.ParamWrapper]]:
    """Which class adapts a parameter of a module, that may be wrapped already; None if it is none of an experts
    module."""
    experts = target.get_base_layer() if hasattr(target, "get_base_layer") else target
    kinds = (kind.ParamWrapper for kind in (lora_four_bit, lora) if kind.has_experts(experts, parameter_name))
    return next(kinds, None)


def to_dict(config: LoraConfig) -> dict[str, Any]:
    """What adapter_config.json holds: without dropout if parameters are adapted, which PEFT would refuse to load."""
    values = _to_dict(config)
    if config.target_parameters and values["lora_dropout"]:
        logger.warning_once(
            f"lora_dropout={config.lora_dropout} is saved as 0, since PEFT without qwen3_moe_integration loads no "
            "adapter of parameters that has dropout. To train a loaded adapter further, give from_pretrained the config"
        )
        values["lora_dropout"] = 0.0
    return values
