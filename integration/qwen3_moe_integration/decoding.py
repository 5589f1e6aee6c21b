"""Weights of linear layers in 4 bit, decoded: bitsandbytes takes three launches for each, the kernel one.

Both give the same numbers, so it is a matter of time alone who decodes. Calls of few rows stay bitsandbytes': for them
it has products that decode as they go.
"""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Optional

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit

Tensor = torch.Tensor

Decode = Callable[..., Tensor]
"""``decode(dtype) -> W (out, in)``, by default in the dtype that W had before it was packed."""

ROWS, ROWS_OF_SMALL, SMALL = 512, 1536, 4 * 2**20
"""The most rows for which bitsandbytes 0.50 decodes as it goes, on any GPU: in general, and for a weight of fewer than
that many numbers and more than twice as many outputs as inputs."""


def can_decode(device: torch.device) -> bool:
    """Whether a kernel decodes there. On a CPU bitsandbytes is faster."""
    return device.type == "cuda"


def product(layer: Linear4bit, x: Tensor, kernel: Optional[ModuleType], out: Optional[Tensor] = None) -> Tensor:
    """``layer(x)`` to the last bit.

    Args:
        layer: neither its weight nor its bias is trained.
        x: (T, in), in the dtype that the layer computes in.
        kernel: what decodes; bitsandbytes if None.
        out: where to write it; new memory if None.
    """
    if kernel is None or not _only_decodes(layer, x):
        made = layer(x)
        return made if out is None else out.copy_(made)
    weight = decoder(layer, kernel)(x.dtype).t()
    if layer.bias is None:
        return torch.mm(x, weight, out=out)
    return torch.addmm(layer.bias.to(x.dtype), x, weight, out=out)


def _only_decodes(layer: Linear4bit, x: Tensor) -> bool:
    """Whether ``layer(x)`` would decode the whole weight, multiply, and do nothing else."""
    state = getattr(layer.weight, "quant_state", None)
    # A call also finds a state that was lost, chooses the dtype to compute in, and takes weights that lie across.
    settled = state is not None and layer.compute_type_is_set and state.shape[1] == x.shape[1]
    return settled and is_decoded_whole(x.shape[0], *state.shape)


def is_decoded_whole(rows: int, out_features: int, in_features: int) -> bool:
    """Whether bitsandbytes decodes a whole weight to multiply so many rows, whatever the GPU."""
    small = out_features * in_features < SMALL and out_features > 2 * in_features
    return rows > (ROWS_OF_SMALL if small else ROWS)


def decoder(layer: Linear4bit, kernel: Optional[ModuleType]) -> Decode:
    """What decodes the weight of a layer that was called before: the bytes of now, since bitsandbytes may give the
    layer others for inference."""
    packed, state = layer.weight.data, layer.weight.quant_state
    if kernel is None:
        return partial(dequantize_4bit, packed, state)

    def decode(dtype: Optional[torch.dtype] = None) -> Tensor:
        weight = kernel.four_bit_weight(packed, state)._replace(shape=(1, *state.shape))
        return kernel.dequantize(weight, dtype)[0]

    return decode
