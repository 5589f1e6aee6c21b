"""4-bit stacks: from bitsandbytes' parameter to plain tensors, and back to full precision.

``four_bit_weight`` is the one place that looks into a ``QuantState``; it asks for attributes, so that bitsandbytes
need not be installed.
"""

from typing import List, Optional

import torch

from ._ops import add_op_namespace_prefix
from .backends import DEQUANTIZE, op_is_seen
from .checks import KERNEL_FLOATS
from .projection import FourBitWeight, Projection, check_four_bit, unflatten

Tensor = torch.Tensor


def four_bit_weight(parameter: Tensor, quant_state=None) -> FourBitWeight:
    """The plain tensors of a bitsandbytes ``Params4bit`` that holds a stack (E, N, K).

    Nothing is copied, and nothing is checked yet: whoever computes with the weight does.

    Args:
        parameter: its data are the packed weights, in any storage dtype.
        quant_state: bitsandbytes' description of them; by default that of ``parameter``.

    Raises:
        TypeError: there is no description, so the parameter is in full precision or not quantized yet.
    """
    state = getattr(parameter, "quant_state", None) if quant_state is None else quant_state
    if state is None:
        raise TypeError(
            f"parameter must be a Params4bit that is quantized, got {type(parameter).__name__} without a quant_state"
        )
    nested = state.state2 if state.nested else None
    return FourBitWeight(
        packed=parameter.detach().reshape(-1).view(torch.uint8),
        absmax=state.absmax,
        code=state.code,
        nested_absmax=nested and nested.absmax,
        nested_code=nested and nested.code,
        nested_offset=nested and state.offset,
        shape=tuple(state.shape),
        blocksize=state.blocksize,
        nested_blocksize=nested.blocksize if nested else 0,
        quant_type=state.quant_type,
        dtype=state.dtype,
    )


def dequantize(weight: FourBitWeight, dtype: Optional[torch.dtype] = None) -> Tensor:
    """The stack (E, N, K) in full precision, as ``bitsandbytes.functional.dequantize_4bit`` gives it.

    All numbers are equal, and but for zeros bit for bit: FP4's nibble 8 is 0.0, as in bitsandbytes' codebook, where
    some of its code gives -0.0. (On a CPU, it may also make 0 of numbers below 1.2e-38 in bf16.)

    Args:
        weight: the packed stack.
        dtype: of the result: bf16, fp16 or fp32; by default ``weight.dtype``.

    Raises:
        TypeError, ValueError: naming the field of ``weight``, what it got and what it wants.
    """
    if not isinstance(weight, FourBitWeight):
        raise TypeError(f"weight must be a FourBitWeight, as four_bit_weight gives it, got {type(weight).__name__}")
    check_four_bit("weight", weight)
    dtype = dtype or weight.dtype
    if dtype not in KERNEL_FLOATS:
        raise TypeError(f"dtype must be one of {', '.join(map(str, KERNEL_FLOATS))}, got {dtype}")
    if op_is_seen(weight[:6]):
        return _dequantize(*Projection(weight).flatten()[:7], dtype)
    return DEQUANTIZE[weight.device.type](weight, dtype)


@torch.library.custom_op(add_op_namespace_prefix("dequantize"), mutates_args=(), device_types=("cpu", "cuda"))
def _dequantize(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    nested_absmax: Optional[Tensor],
    nested_code: Optional[Tensor],
    nested_offset: Optional[Tensor],
    numbers: List[int],
    dtype: torch.dtype,
) -> Tensor:
    flat = (packed, absmax, code, nested_absmax, nested_code, nested_offset, numbers, None, None, 1.0, 0.0)
    return DEQUANTIZE[packed.device.type](unflatten(flat, dtype).weight, dtype)


@_dequantize.register_fake
def _(packed, absmax, code, nested_absmax, nested_code, nested_offset, numbers, dtype):
    return packed.new_empty(numbers[:3], dtype=dtype)
