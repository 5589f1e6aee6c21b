"""The quantizer, which Transformers finds by the config: which parameters are in 4 bit, and who converts them."""

import re
from collections.abc import Iterable
from typing import Any, Optional

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightTransform
from transformers.integrations import replace_with_bnb_linear
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationMethod

from ..experts import EXPERTS_IMPLEMENTATION
from ..registry import registered_experts
from .config import METHOD, MoeBitsAndBytesConfig
from .conversion import AsItIs, Quantize, QuantizeStack, Reader, ReadStack, ReadWeight
from .files import SAVE_ID, check_files, new_save_id
from .stacks import decode, place_stack

PROJECTIONS = ("gate_up_proj", "down_proj")

logger = logging.get_logger(__name__)


@register_quantizer(METHOD)
class MoeBitsAndBytesQuantizer(Bnb4BitHfQuantizer):
    """Linear layers as bitsandbytes has them, and every stack of experts that the kernel can multiply with.

    Attributes:
        stacks: full name and shape (E, N, K) of each parameter that becomes a stack in 4 bit.
        skipped: names of those that could be one and are not to be.
    """

    quantization_config: MoeBitsAndBytesConfig
    stacks: dict[str, torch.Size]
    skipped: list[str]

    def _process_model_before_weight_loading(
        self, model: nn.Module, device_map: Any, checkpoint_files: Optional[list[str]] = None, **kwargs: Any
    ) -> None:
        _refuse_sharing_out(model)
        config = self.quantization_config
        save_id = config.save_id if self.pre_quantized else None
        self._saved_names = check_files(checkpoint_files or (), save_id)
        self.modules_to_not_convert = self.get_modules_to_not_convert(
            model, config.llm_int8_skip_modules, model._keep_in_fp32_modules, add_default_skips=True
        )
        self.stacks, self.skipped = self._find_stacks(model)
        linear_skips = [*self.modules_to_not_convert, *_routers(model)]
        replace_with_bnb_linear(model, linear_skips, config, pre_quantized=self.pre_quantized)
        for module in model.modules():
            if isinstance(module, Linear4bit):
                # Or bitsandbytes packs the weights anew when the layer first evaluates on such a CPU, for a product
                # that has no gradient: what trains afterwards, trains without what lies behind the layer.
                module.support_avx512bf16_for_cpu = False
        for module in {name.rpartition(".")[0] for name in self.stacks}:
            model.get_submodule(module).register_state_dict_post_hook(_add_statistics)
        if self.pre_quantized:
            for name in self.stacks:
                _replace(model, name, model.get_parameter(name).to(config.bnb_4bit_quant_storage))
            for name in self._in_4_bit(model):  # what is missing is an error later; random numbers cannot be 4 bit
                model.get_submodule(name.rpartition(".")[0])._is_hf_initialized = True
        model.set_experts_implementation(EXPERTS_IMPLEMENTATION)

    def _in_4_bit(self, model: nn.Module) -> list[str]:
        """The names of all parameters that are in 4 bit, or will be."""
        linear = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear4bit)]
        return [*self.stacks, *linear]

    def _find_stacks(self, model: nn.Module) -> tuple[dict[str, torch.Size], list[str]]:
        unsupported_reason = registered_experts().unsupported_reason
        stacks, skipped, reasons = {}, [], {}
        for module_name, module in model.named_modules():
            if not hasattr(module, "is_transposed") or "down_proj" not in module._parameters:
                continue
            reason = unsupported_reason(module)
            if reason is None and module.is_transposed:
                reason = "its weights are stored transposed"
            if reason is not None:
                reasons[type(module).__name__] = reason
                continue
            for projection in PROJECTIONS:
                name = f"{module_name}.{projection}"
                if all(should_convert_module(x, self.modules_to_not_convert) for x in (module_name, name)):
                    stacks[name] = module._parameters[projection].shape
                else:
                    skipped.append(name)
        for experts, reason in reasons.items():
            logger.warning(f"{experts} stays in full precision, the kernel cannot compute it: {reason}")
        if not stacks and not skipped:
            raise ValueError(
                f"{type(model).__name__} has no experts that can be in 4 bit"
                f"{''.join(f'; {experts}: {reason}' for experts, reason in reasons.items())}. "
                "BitsAndBytesConfig is for its other layers"
            )
        return stacks, skipped

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.stacks or super().param_needs_quantization(model, param_name, **kwargs)

    def get_quantize_ops(self) -> ConversionOps:
        return Quantize(super().get_quantize_ops(), self.stacks, self.quantization_config)

    def update_weight_conversions(self, weight_conversions: list[WeightTransform], *args: Any) -> list[WeightTransform]:
        """Has a converter of ours in the place of each that makes a stack of experts."""
        kind = ReadStack if self.pre_quantized else QuantizeStack
        conversions = [
            _like(kind, each) if self._makes_stack(each) else each
            for each in super().update_weight_conversions(weight_conversions, *args)
        ]
        whole = [
            kind([rf"(?<!\w){re.escape(name)}{'' if self.pre_quantized else '$'}"], name, [AsItIs()])
            for name in _last_names([*self.stacks, *self.skipped])
        ]
        if not self.pre_quantized:
            return conversions + whole
        return whole + list(_fused_in_2025(self.stacks, self._saved_names)) + conversions

    def _makes_stack(self, conversion: WeightTransform) -> bool:
        return (
            isinstance(conversion, WeightConverter)
            and len(conversion.target_patterns) == 1
            and any(name.endswith(conversion.target_patterns[0]) for name in self.stacks)
        )

    def get_weight_conversions(self) -> list[WeightTransform]:
        return [ReadWeight(["weight"], "weight", [AsItIs()])] if self.pre_quantized else []

    def get_new_dtype(self, converter: WeightTransform, param: Any, dtype: Optional[torch.dtype]):
        """Packed tensors and statistics stay as they were saved; the converter casts the others."""
        return None if isinstance(converter, Reader) else super().get_new_dtype(converter, param, dtype)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for name in self._in_4_bit(model):
            if getattr(model.get_parameter(name), "quant_state", None) is None:
                raise ValueError(f"{name}: the checkpoint has nothing of it")
        for name in self.stacks:
            module, _, projection = name.rpartition(".")
            place_stack(model.get_submodule(module), projection, model.get_parameter(name))
        # Transformers, Accelerate and PEFT ask for this before they move or cast a model.
        model.quantization_method = QuantizationMethod.BITS_AND_BYTES
        return super()._process_model_after_weight_loading(model, **kwargs)

    @property
    def is_compileable(self) -> bool:
        """With a static cache, ``generate`` compiles what a token takes: bitsandbytes and the kernel let it."""
        return True

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[None, dict[str, str]]:
        """Called when ``save_pretrained`` begins; what it returns goes into every file of weights."""
        self.quantization_config.save_id = new_save_id()
        model.config.quantization_config = self.quantization_config
        return None, {SAVE_ID: self.quantization_config.save_id}

    def _dequantize(self, model: nn.Module, dtype: Optional[torch.dtype] = None) -> nn.Module:
        if isinstance(dtype, str):  # as in the config of a model that was saved
            dtype = getattr(torch, dtype)
        model = super()._dequantize(model, dtype=dtype)
        for name in self.stacks:
            weight = decode(model.get_parameter(name))
            _replace(model, name, weight if dtype is None else weight.to(dtype))
            model.get_submodule(name.rpartition(".")[0]).quant_states = {}
        model._weight_conversions = None  # saved from now on as a model that was never quantized
        return model


def _refuse_sharing_out(model: nn.Module) -> None:
    """Transformers would cut packed bytes as if they were rows of weights."""
    distributed = getattr(model.config, "distributed_config", None)
    sizes = {name: getattr(distributed, name, None) or 1 for name in ("tp_size", "fsdp_size", "pp_size")}
    if any(size > 1 for size in sizes.values()):
        raise ValueError(
            "distributed_config must not share out a model that loads in 4 bit, got "
            f"{', '.join(f'{name}={size}' for name, size in sizes.items())}; load it whole on each rank, then train it "
            "under DDP or FSDP2, or call share_out_experts"
        )


def _routers(model: nn.Module) -> list[str]:
    """Linear layers that choose experts or weigh them."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and any(part == "gate" or part.endswith("_gate") or "router" in part for part in name.split("."))
    ]


def _replace(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    module, _, parameter = name.rpartition(".")
    setattr(model.get_submodule(module), parameter, nn.Parameter(tensor, requires_grad=False))


def _last_names(names: Iterable[str]) -> list[str]:
    """What the names of all stacks end with: mostly ``experts.gate_up_proj`` and ``experts.down_proj``."""
    return sorted({".".join(name.split(".")[-2:]) for name in names})


def _like(kind: type, converter: WeightConverter) -> WeightConverter:
    """Reads what ``converter`` reads, for the same part of the model."""
    sources, targets = converter._original_source_patterns, converter._original_target_patterns
    ours = kind(list(sources), list(targets), list(converter.operations))
    ours.scope_prefix, ours.base_model_prefix = converter.scope_prefix, converter.base_model_prefix
    return ours


def _fused_in_2025(stacks: Iterable[str], saved: set[str]) -> Iterable[ReadStack]:
    """Checkpoints of transformers-qwen3-moe-fused: stacks gate_proj, up_proj and down_proj in the block itself.

    A dense layer's weights have the same names, so there is one converter for each block that has them.
    """
    for name in stacks:
        module, _, projection = name.rpartition(".")
        block = module.rpartition(".")[0]
        parts = ("gate_proj", "up_proj") if projection == "gate_up_proj" else (projection,)
        sources = [f"{block}.{part}.weight" for part in parts]
        if saved.issuperset(sources):
            yield ReadStack([re.escape(source) for source in sources], name, [AsItIs()])


def _add_statistics(module: nn.Module, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    """What bitsandbytes needs to decode a stack, beside it, as its own linear layers have it."""
    for projection in PROJECTIONS:
        state = getattr(module._parameters.get(projection), "quant_state", None)
        if state is not None:
            for key, tensor in state.as_dict(packed=True).items():
                state_dict[f"{prefix}{projection}.{key}"] = tensor
