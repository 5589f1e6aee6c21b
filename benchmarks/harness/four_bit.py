"""The comparison's layer with its weights in 4 bit: packed by bitsandbytes, and who multiplies with them.

The right answer is that of the weights as packed, in fp32 as bitsandbytes decodes them: quantizing has an error of its
own, which is nobody's here.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import Any, Callable, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm, silu

from .peers import OURS, Peer, installed
from .problem import Layer, Shape, Weights

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

    def last_rows(experts):
        rows = torch.histc(experts.float(), bins=shape.experts, min=0, max=shape.experts - 1)
        return rows.cumsum(0).to(torch.int32)

    layer = layer_of(Product.apply, packed, last_rows, shape.top_k)
    return Peer("bitsandbytes dequantize + grouped_mm", layer, installed("bitsandbytes"))


def grouped_nf4_gemm(way: str, packed: Packed, shape: Shape) -> Peer:
    """grouped-nf4-gemm from PyPI; ``way`` is "fused", its kernels that decode within a product, or "auto", what it
    chooses for training on this card."""
    from nf4_grouped import dgrad_4bit_grouped, gemm_4bit_grouped, repack_from_bnb
    from nf4_qlora import gemm_4bit_grouped_train

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, *arguments):
            ctx.arguments = arguments
            return gemm_4bit_grouped(x, *arguments)

        @staticmethod
        def backward(ctx, grad):
            return dgrad_4bit_grouped(grad.contiguous(), *ctx.arguments), None, None, None, None

    def repacked(parameter):
        experts, n, k = parameter.quant_state.shape
        data, absmax = repack_from_bnb([parameter.data], [parameter.quant_state], experts * n, k)
        return data.view(experts, n, -1), absmax.view(experts, n, -1)

    def present(experts):
        """It wants the number of rows on the host, and no expert without any."""
        ids, rows = experts.unique(return_counts=True)
        return rows.tolist(), ids.tolist()

    multiply = {"fused": Fused.apply, "auto": gemm_4bit_grouped_train}[way]
    layer = layer_of(
        lambda x, weight, groups: multiply(x, *weight, *groups), map(repacked, packed), present, shape.top_k
    )
    return Peer(
        f"grouped-nf4-gemm {way}",
        layer,
        installed("grouped-nf4-gemm"),
        host_waits="it takes each expert's number of rows from the host",
    )


def layer_of(multiply: Callable, weights: Iterable, groups: Callable[[Tensor], Any], top_k: int) -> Layer:
    """The layer around a peer's grouped product ``multiply(x, weight, groups(experts))``.

    The rows of x (T*k, K) are sorted by expert; ``experts`` (T*k,) are not.
    """
    gate_up_proj, down_proj = weights

    def layer(hidden_states, top_k_index, top_k_weights):
        experts = top_k_index.reshape(-1)
        order = experts.argsort()
        back = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        grouped = groups(experts)
        gate, up = multiply(hidden_states[order // top_k], gate_up_proj, grouped).chunk(2, dim=-1)
        out = multiply(silu(gate) * up, down_proj, grouped) * top_k_weights.reshape(-1)[order, None]
        return out[back].view(*top_k_index.shape, -1).sum(1)

    return layer


def loaders(kernel: Callable[[], ModuleType], shape: Shape, packed: Packed) -> dict[str, Callable[[], Peer]]:
    """Every peer by its name on the command line."""
    return {
        "ours": lambda: ours(kernel(), packed),
        "dequantize": lambda: dequantize_and_grouped_mm(packed, shape),
        "nf4_fused": lambda: grouped_nf4_gemm("fused", packed, shape),
        "nf4_auto": lambda: grouped_nf4_gemm("auto", packed, shape),
    }


PEERS = ("ours", "dequantize", "nf4_fused", "nf4_auto")
