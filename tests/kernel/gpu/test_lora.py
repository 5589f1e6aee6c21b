"""Adapters on a CUDA device: real widths, ranks up to 256, dropout, reruns."""

from dataclasses import replace

import pytest
import torch

from ..adapted import AdaptedLayer, Adapter, Quantization, assert_adapted_experts_agree
from ..oracle import RATIO, assert_close
from .shapes import DEEP, ODD, real

pytestmark = pytest.mark.gpu

BF16, FP32 = torch.bfloat16, torch.float32
AS_TRAINED = Adapter(gate_up_rank=16, down_rank=16, dtype=FP32)


@pytest.mark.parametrize("adapter", [AS_TRAINED, replace(AS_TRAINED, halves=2)], ids=repr)
@pytest.mark.parametrize("tokens", [16, 300])
def test_the_real_layer(kernel, tokens, adapter):
    assert_adapted_experts_agree(kernel, real(tokens), "cuda", BF16, adapter=adapter)


@pytest.mark.parametrize("adapter", [AS_TRAINED, Adapter(40, 8, halves=2)], ids=repr)
@pytest.mark.parametrize("problem", [real(1), real(16), real(130), replace(DEEP, I=256)], ids=repr)
def test_over_4_bit_weights_in_each_of_their_tiles(kernel, problem, adapter):
    assert_adapted_experts_agree(kernel, problem, "cuda", BF16, Quantization(), adapter)


@pytest.mark.parametrize(
    "adapter",
    [Adapter(1, 256), Adapter(256, 1, halves=2), Adapter(33, 100, dtype=torch.float16), Adapter(64, 128, dtype=FP32)],
    ids=repr,
)
def test_any_rank_where_tiles_are_largest(kernel, adapter):
    assert_adapted_experts_agree(kernel, DEEP, "cuda", BF16, adapter=adapter)


@pytest.mark.parametrize(
    ("problem", "quantization"),
    [(ODD, None), (DEEP, None), (replace(DEEP, I=256), Quantization()), (DEEP, Quantization())],
    ids=["odd", "deep", "4 bit, fast", "4 bit, dequantized"],  # for want of whole tiles: 192 columns
)
@pytest.mark.parametrize("adapter", [Adapter(), Adapter(48, 40, halves=2, dtype=FP32)], ids=repr)
def test_dropout_is_that_of_the_reference(kernel, launchers, problem, quantization, adapter):
    layer = AdaptedLayer(launchers, problem, adapter, BF16, 0.3, "cuda", quantization)
    expected = layer.run(kernel.reference.experts_forward, kernel.reference.experts_backward)
    for name, want, got in layer.pairs(expected, launchers.experts_forward, launchers.experts_backward):
        assert_close(name, want, got, RATIO[BF16])


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("tokens", [24, 520])
def test_forty_reruns_are_bit_identical(launchers, tokens, dropout):
    adapter = Adapter(64, 64, halves=2, dtype=FP32)
    layer = AdaptedLayer(launchers, replace(DEEP, T=tokens), adapter, BF16, dropout, "cuda")
    first = layer.run(launchers.experts_forward, launchers.experts_backward)
    for _ in range(40):
        again = layer.run(launchers.experts_forward, launchers.experts_backward)
        assert all(torch.equal(first[name], again[name]) for name in first)
