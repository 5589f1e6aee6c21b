"""What Transformers' loader does with the tensors of one parameter: quantizes them, or puts together what was saved.

Each is a ``WeightConverter`` with a ``convert`` of its own, for two reasons. The loader's own reads all tensors of a
parameter before it converts them, a whole stack in full precision; here they are read one by one. And it goes on after
an error and drowns it in a report; here an error is raised at once.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from copy import copy
from typing import Any, Optional

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
    WeightTransform,
)

from .stacks import decode, join_stacks, quantize_stack, read_stack

Tensor = torch.Tensor

STATISTICS = {
    "absmax": r"\.absmax",
    "quant_map": r"\.quant_map",
    "nested_absmax": r"\.nested_absmax",
    "nested_quant_map": r"\.nested_quant_map",
    "quant_state": r"\.quant_state\.bitsandbytes__.+",
}
"""What bitsandbytes saves beside a packed tensor, and how its name goes on, as a pattern."""


class AsItIs(ConversionOps):
    """One tensor that needs no conversion."""

    def convert(self, input_dict: dict[str, Any], target_patterns: list[str], **kwargs: Any) -> dict[str, Any]:
        (tensors,) = input_dict.values()
        return {target_patterns[0]: tensors}


class _Converter(WeightConverter):
    __slots__ = ()

    def __deepcopy__(self, memo: dict) -> "_Converter":
        """For every tensor of a checkpoint the loader makes a copy of its converter; those of tensors of one parameter
        are thrown away but for one. What does not change is shared."""
        twin = copy(self)
        twin.collected_tensors, twin.layer_targets = defaultdict(list), defaultdict(set)
        return twin

    def reverse_transform(self) -> WeightTransform:
        """Neither a renaming nor a conversion, so nothing: what was made here is saved as it is."""
        return WeightTransform(list(self._original_target_patterns), list(self._original_target_patterns))

    def _in_full(self, name: str, model: nn.Module, config: Any, loading_info: Any) -> Tensor:
        """What Transformers makes of the tensors."""
        self.quantization_operation = None
        (tensor,) = super().convert(name, model=model, config=config, loading_info=loading_info).values()
        tensor = tensor[0] if isinstance(tensor, list) else tensor
        _check_shape(name, model, tensor.shape)
        return tensor


class QuantizeStack(_Converter):
    """A stack of experts of a checkpoint in full precision."""

    __slots__ = ()

    def convert(self, layer_name: str, model=None, config=None, hf_quantizer=None, loading_info=None) -> dict:
        shape = hf_quantizer.stacks.get(layer_name)
        if shape is None:
            return {layer_name: self._in_full(layer_name, model, config, loading_info)}
        if [type(op) for op in self.operations] in ([MergeModulelist], [MergeModulelist, Concatenate]):
            parts = [self.collected_tensors.pop(pattern, []) for pattern in self.source_patterns]
            experts = _one_by_one(layer_name, dict(zip(self.source_patterns, parts)), shape[0])
        else:
            experts = self._in_full(layer_name, model, config, loading_info)
        return {layer_name: quantize_stack(layer_name, experts, shape, hf_quantizer.quantization_config)}


class Reader(_Converter):
    """Collects what bitsandbytes saved: packed tensors, and the statistics beside each."""

    __slots__ = ()

    def __init__(self, source_patterns: Sequence[str], target_patterns: str, operations: list[ConversionOps]):
        # In the oldest supported Transformers the first pattern that matches counts, not the longest.
        beside = [pattern + ending for pattern in source_patterns for ending in STATISTICS.values()]
        super().__init__(beside + [pattern + "$" for pattern in source_patterns], target_patterns, operations)

    def _is_plain(self) -> bool:
        return all(pattern.endswith("$") for pattern in self.collected_tensors)

    def _read(self, name: str, storage: torch.dtype) -> list[list[Params4bit]]:
        """Of each pattern that was found, the tensors in the order of their names."""
        found, read = self.materialize_tensors(), []
        for pattern in (each[:-1] for each in self.source_patterns if each.endswith("$")):
            entries = {key: found.get(pattern + ending) for key, ending in STATISTICS.items()}
            entries = {key: tensors for key, tensors in entries.items() if tensors is not None}
            weights = found.get(pattern + "$", [])
            if any(len(tensors) != len(weights) for tensors in entries.values()):
                counts = ", ".join(f"{len(tensors)} {key}" for key, tensors in entries.items())
                raise ValueError(
                    f"{name}: the checkpoint has {len(weights)} tensors {pattern}, but {counts} beside them"
                )
            if not weights:
                raise ValueError(f"{name}: the checkpoint has no tensor {pattern}")
            read.append(
                [
                    read_stack(
                        f"{name} ({pattern.replace('*', str(i))})" if "*" in pattern else name,
                        weight,
                        {key: tensors[i] for key, tensors in entries.items()},
                        storage,
                    )
                    for i, weight in enumerate(weights)
                ]
            )
        return read


class ReadStack(Reader):
    """A stack of experts of a checkpoint in 4 bit: as ``save_pretrained`` wrote it, or quantized in parts.

    Where the checkpoint has the experts in full precision, as Transformers' own 4-bit checkpoints do, they are
    quantized.
    """

    __slots__ = ()

    def convert(self, layer_name: str, model=None, config=None, hf_quantizer=None, loading_info=None) -> dict:
        shape = hf_quantizer.stacks.get(layer_name)
        if self._is_plain():
            experts = self._in_full(layer_name, model, config, loading_info)
            if shape is None:
                return {layer_name: experts.to(model.get_parameter(layer_name).dtype)}
            return {layer_name: quantize_stack(layer_name, experts, shape, hf_quantizer.quantization_config)}
        if shape is None:
            raise ValueError(f"{layer_name} is in 4 bit, but was to stay as it is: see llm_int8_skip_modules")
        storage = hf_quantizer.quantization_config.bnb_4bit_quant_storage
        return {layer_name: join_stacks(layer_name, self._read(layer_name, storage), shape)}


class ReadWeight(Reader):
    """Any other parameter of a checkpoint in 4 bit.

    The weight of a linear layer stays in 4 bit. What the model holds otherwise, as a router that was a linear layer
    once, is decoded.
    """

    __slots__ = ()

    def convert(self, layer_name: str, model=None, config=None, hf_quantizer=None, loading_info=None) -> dict:
        module = model.get_submodule(layer_name.rpartition(".")[0])
        in_4_bit = isinstance(module, Linear4bit) and layer_name.endswith(".weight")
        if self._is_plain():
            if in_4_bit:
                raise ValueError(f"{layer_name} is not in 4 bit; if it is to stay so, add it to llm_int8_skip_modules")
            tensor = self._in_full(layer_name, model, config, loading_info)
            return {layer_name: tensor.to(model.get_parameter_or_buffer(layer_name).dtype)}
        ((parameter,),) = self._read(layer_name, hf_quantizer.quantization_config.bnb_4bit_quant_storage)
        _check_shape(layer_name, model, parameter.quant_state.shape)
        if not in_4_bit:
            return {layer_name: decode(parameter).to(model.get_parameter(layer_name).dtype)}
        parameter.module, module.quant_state = module, parameter.quant_state
        module._is_hf_initialized = True
        return {layer_name: parameter}


class Quantize(ConversionOps):
    """Any other parameter of a checkpoint in full precision: ``linear`` is Transformers' own operation."""

    def __init__(self, linear: ConversionOps, stacks: Mapping[str, Sequence[int]], settings: Any):
        self.linear, self.stacks, self.settings = linear, stacks, settings

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        stacks = {name: input_dict.pop(name) for name in [*input_dict] if name in self.stacks}
        quantized = self.linear.convert(input_dict, **kwargs) if input_dict else {}
        for name, tensor in stacks.items():
            tensor = tensor[0] if isinstance(tensor, list) else tensor
            quantized[name] = quantize_stack(name, tensor, self.stacks[name], self.settings)
        return quantized


def _check_shape(name: str, model: nn.Module, shape: Sequence[int]) -> None:
    wanted = model.get_parameter_or_buffer(name).shape
    if tuple(shape) != tuple(wanted):
        raise ValueError(f"{name}: the model wants a shape of {tuple(wanted)}, the checkpoint has {tuple(shape)}")


def _one_by_one(name: str, parts: Mapping[str, Sequence[Any]], experts: int) -> Iterator[Tensor]:
    """The matrix of each expert, of parts that are not read yet."""
    for pattern, entries in parts.items():
        if len(entries) != experts:
            raise ValueError(f"{name}: the checkpoint has {len(entries)} of {experts} tensors {pattern}")
    for entries in zip(*parts.values()):
        tensors = [_loaded(entry) for entry in entries]
        yield torch.cat(tensors) if len(tensors) > 1 else tensors[0]


def _loaded(entry: Any) -> Optional[Tensor]:
    """The loader's promise of a tensor: a function, or a future if it reads in threads."""
    if isinstance(entry, Future):
        return entry.result()
    return entry if isinstance(entry, Tensor) else entry()
