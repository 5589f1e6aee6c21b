"""LoRA of experts that are in 4 bit: what PEFT's wrapper would read of a dense parameter, read of a packed one.

Merged, the weights are decoded, added to and quantized again, as PEFT does with bitsandbytes' linear layers, with the
same warning; but they are decoded to fp32, so that nothing but the quantization rounds.
"""

import warnings
from typing import Any, Optional

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from . import lora
from .quantize.config import MoeBitsAndBytesConfig
from .quantize.stacks import decode, place_stack, quantize_stack


class ParamWrapper(lora.ParamWrapper):
    """Adapts one projection of experts in 4 bit, which run on the kernel alone."""

    def get_param(self) -> nn.Parameter:
        """The packed stack, also where another library has PEFT's wrapper decode it here."""
        return getattr(self.get_base_layer(), self.parameter_name)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        """In the order of the stack's dimensions; PEFT swaps them, as for any experts that are not transposed."""
        self.num_experts, rows, columns = self.get_param().quant_state.shape
        self._param_ndim = 3
        return rows, columns

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Optional[torch.device] = None) -> None:
        """To the dtype that the weights compute in, whatever they are stored as."""
        parameter = self.get_param()
        for factor in (self.lora_A, self.lora_B):
            if adapter_name in factor and not factor[adapter_name].weight.is_meta:
                factor[adapter_name].to(parameter.device, parameter.quant_state.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: Optional[list[str]] = None) -> None:
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.lora_A:
                warnings.warn(
                    "Merge lora module to 4-bit linear may get different generations due to rounding errors.",
                    stacklevel=2,
                )
                self._add(name, self.scaling[name], check=safe_merge)
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.lora_A:
                warnings.warn(
                    "Unmerge lora module to 4-bit linear may get different generations due to rounding errors.",
                    stacklevel=2,
                )
                self._add(name, -self.scaling[name], check=False)

    @torch.no_grad()
    def _add(self, adapter_name: str, scaling: float, check: bool) -> None:
        """Puts ``W + scaling * B @ A`` in the parameter's place."""
        old = self.get_param()
        A, B = (factor.float() for factor in self.factors(adapter_name))
        weight = decode(old, torch.float32).baddbmm_(B, A, alpha=scaling)
        if check and not weight.isfinite().all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken")
        state = old.quant_state
        settings = MoeBitsAndBytesConfig(
            bnb_4bit_compute_dtype=state.dtype,
            bnb_4bit_quant_type=state.quant_type,
            bnb_4bit_use_double_quant=state.nested,
            bnb_4bit_quant_storage=old.dtype,
            experts_blocksize=state.blocksize,
        )
        merged = quantize_stack(self.parameter_name, weight, weight.shape, settings)
        place_stack(self.get_base_layer(), self.parameter_name, merged)

    def _check_plain(self, experts: nn.Module) -> None:
        raise ValueError(
            f"{type(experts).__name__} is in 4 bit, so it can run on the kernel alone; call kernelize_model"
        )


def has_experts(module: nn.Module, parameter_name: Optional[str]) -> bool:
    """Whether a parameter is a stack in 4 bit that is one of the two projections of an experts module."""
    state: Any = getattr(getattr(module, parameter_name or "", None), "quant_state", None)
    return parameter_name in lora.PROJECTIONS and state is not None and len(state.shape) == 3
