"""Weights of linear layers in 4 bit, decoded: bitsandbytes takes three launches for each, the kernel one.

Both give the same bits, so it is a matter of time alone who decodes. Calls of few rows stay bitsandbytes': for them it
has products that decode as they go.
"""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Optional

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch.nn.functional import linear

Tensor = torch.Tensor

Decode = Callable[..., Tensor]
"""``decode(dtype) -> W (out, in)``, by default in the dtype that W had before it was packed."""

ROWS, ROWS_OF_SMALL, SMALL = 512, 1536, 4 * 2**20
"""The most rows for which bitsandbytes 0.50 decodes as it goes, on any GPU: in general, and for a weight of fewer than
that many numbers and more than twice as many outputs as inputs."""


def can_decode(device: torch.device) -> bool:
    """Whether a kernel decodes there. On a CPU bitsandbytes is faster."""
    return device.type == "cuda"


def product(layer: Linear4bit, x: Tensor, kernel: Optional[ModuleType]) -> tuple[Tensor, Decode]:
    """``layer(x)`` to the last bit, and what decodes the weight of this call again.

    Args:
        layer: neither its weight nor its bias is trained.
        x: (T, in), in the dtype that the layer computes in.
        kernel: what decodes; bitsandbytes if None.
    """
    if kernel is None or not _only_decodes(layer, x):
        return layer(x), _decoder(layer, kernel)
    decode = _decoder(layer, kernel)
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return linear(x, decode(x.dtype), bias), decode


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


def _decoder(layer: Linear4bit, kernel: Optional[ModuleType]) -> Decode:
    """For the bytes of now: bitsandbytes may give the layer others for inference."""
    weight, state = layer.weight, layer.weight.quant_state
    if kernel is None:
        return partial(dequantize_4bit, weight.data, state)
    packed = kernel.four_bit_weight(weight, state)._replace(shape=(1, *state.shape))
    return lambda dtype=None: kernel.dequantize(packed, dtype)[0]
