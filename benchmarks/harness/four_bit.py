"""The comparison's layer with its weights in 4 bit: packed by bitsandbytes, and who multiplies with them.

The right answer is that of the weights as packed, in fp32 as bitsandbytes decodes them: quantizing has an error of its
own, which is nobody's here.
"""

from __future__ import annotations

from types import ModuleType
from typing import Callable, NamedTuple

import torch
from torch import nn
from torch.nn.functional import grouped_mm, silu

from .peers import OURS, Peer, installed
from .problem import Shape, Weights

WEIGHT_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes per weight: half a byte, for every 64 weights a byte of absmax, and for every 256 of those an fp32 number."""


class Packed(NamedTuple):
    """bitsandbytes' parameters: nf4, blocks of 64, double quantization."""

    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter


def pack(weights: Weights) -> tuple[Packed, Weights]:
    """The weights packed, and in fp32 what they have become."""
    import bitsandbytes as bnb

    packed = []
    for weight in weights:
        data, state = bnb.functional.quantize_4bit(weight.data, quant_type="nf4", compress_statistics=True)
        packed.append(bnb.nn.Params4bit(data, requires_grad=False, quant_state=state, bnb_quantized=True))
    exact = []
    for parameter, weight in zip(packed, weights):
        state = parameter.quant_state
        state.dtype = torch.float32
        exact.append(nn.Parameter(bnb.functional.dequantize_4bit(parameter.data, state), requires_grad=False))
        state.dtype = weight.dtype
    return Packed(*packed), Weights(*exact)


def ours(kernel: ModuleType, packed: Packed) -> Peer:
    weights = [kernel.four_bit_weight(parameter) for parameter in packed]

    def layer(hidden_states, top_k_index, top_k_weights):
        return kernel.fused_experts(hidden_states, top_k_index, top_k_weights, *weights)

    return Peer(OURS, layer, None)


def dequantize_and_grouped_mm(packed: Packed, shape: Shape) -> Peer:
    """What Transformers' grouped_mm does with weights that bitsandbytes decodes whole, again in backward."""
    import bitsandbytes as bnb

    class Product(torch.autograd.Function):
        """x (rows, K) by expert times its decoded matrix; the decoded stack is not kept."""

        @staticmethod
        def forward(ctx, x, parameter, ends):
            ctx.parameter, ctx.ends = parameter, ends
            stack = bnb.functional.dequantize_4bit(parameter.data, parameter.quant_state)
            return grouped_mm(x, stack.transpose(1, 2), offs=ends)

        @staticmethod
        def backward(ctx, grad):
            stack = bnb.functional.dequantize_4bit(ctx.parameter.data, ctx.parameter.quant_state)
            return grouped_mm(grad.contiguous(), stack, offs=ctx.ends), None, None

    def layer(hidden_states, top_k_index, top_k_weights):
        experts = top_k_index.reshape(-1)
        order = experts.argsort()
        back = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        rows = torch.histc(experts.float(), bins=shape.experts, min=0, max=shape.experts - 1)
        ends = rows.cumsum(0).to(torch.int32)
        gate, up = Product.apply(hidden_states[order // shape.top_k], packed.gate_up_proj, ends).chunk(2, dim=-1)
        out = Product.apply(silu(gate) * up, packed.down_proj, ends) * top_k_weights.reshape(-1)[order, None]
        return out[back].view(*top_k_index.shape, -1).sum(1)

    return Peer("bitsandbytes dequantize + grouped_mm", layer, installed("bitsandbytes"))


def loaders(kernel: Callable[[], ModuleType], shape: Shape, packed: Packed) -> dict[str, Callable[[], Peer]]:
    """Every peer by its name on the command line."""
    return {
        "ours": lambda: ours(kernel(), packed),
        "dequantize": lambda: dequantize_and_grouped_mm(packed, shape),
    }


PEERS = ("ours", "dequantize")
