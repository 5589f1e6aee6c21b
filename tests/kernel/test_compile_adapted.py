"""The ops with 4-bit weights and adapters, as PyTorch sees them: schemas, fake results, autograd registrations."""

import importlib
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from .adapted import FACTORS, Adapter, Quantization
from .problems import Problem

PROBLEM = Problem(H=64, I=32, imbalance="some_skipped")
CASES = [
    pytest.param(Quantization(), None, id="4 bit"),
    pytest.param(Quantization("fp4", nested=False), Adapter(halves=2), id="4 bit and adapters"),
    pytest.param(None, Adapter(), id="adapters"),
]


class Ops(NamedTuple):
    """The two ops, and the plain arguments of forward without the last, ``save``."""

    forward: torch._ops.OpOverload
    backward: torch._ops.OpOverload
    arguments: tuple


def ops(kernel: ModuleType, quantization, adapter) -> Ops:
    files = {file: importlib.import_module(f"{kernel.__name__}.{file}") for file in ("experts_op", "projection")}
    *tokens, gate_up, down, _ = PROBLEM.draw("cpu", torch.float32)
    tokens[0].requires_grad_()
    factors = adapter.draw(PROBLEM, "cpu", torch.float32) if adapter else {}
    flat = []
    for name, weight in (("gate_up", gate_up), ("down", down)):
        weight = kernel.four_bit_weight(quantization.quantize(weight)) if quantization else weight
        lora = kernel.Lora(*(factors[f"{name}_{x}"].requires_grad_() for x in "AB"), 0.5) if adapter else None
        flat += files["projection"].Projection(weight, lora).flatten()
    return Ops(files["experts_op"].forward_op, files["experts_op"].backward_op, (*tokens, *flat, None, "silu"))


@pytest.mark.parametrize("save", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize(("quantization", "adapter"), CASES)
def test_opcheck_experts(kernel, quantization, adapter, save):
    op = ops(kernel, quantization, adapter)
    with torch.set_grad_enabled(save):
        arguments = op.arguments if save else tuple(_detached(op.arguments))
        torch.library.opcheck(op.forward, (*arguments, save))


@pytest.mark.parametrize(("quantization", "adapter"), CASES)
def test_opcheck_experts_backward(kernel, quantization, adapter):
    op = ops(kernel, quantization, adapter)
    arguments = tuple(_detached(op.arguments))
    out, *saved = op.forward(*arguments, True)
    wanted = [True, True, False, False, *[adapter is not None] * len(FACTORS)]
    torch.library.opcheck(op.backward, (torch.randn_like(out), *arguments, *saved, wanted))


@pytest.mark.parametrize("quantization", [Quantization(), Quantization("fp4", nested=False)], ids=repr)
def test_opcheck_dequantize(kernel, quantization):
    four_bit = importlib.import_module(f"{kernel.__name__}.four_bit")
    weight = kernel.four_bit_weight(quantization.quantize(torch.randn(3, 10, 64)))
    numbers = [*weight.shape, weight.blocksize, weight.nested_blocksize]
    flat = importlib.import_module(f"{kernel.__name__}.projection").Projection(weight).flatten()[:7]
    assert flat[-1][: len(numbers)] == numbers
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        torch.library.opcheck(four_bit._dequantize, (*flat, dtype))


def _detached(arguments):
    return (x.detach() if isinstance(x, torch.Tensor) else x for x in arguments)
