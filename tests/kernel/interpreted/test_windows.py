"""down and the gradient of hidden_states in halves of their columns, through the Triton kernels."""

import importlib
from typing import Optional

import pytest
import torch

from ..adapted import AdaptedLayer, Adapter, Quantization
from ..problems import Problem
from ..windows import assert_halves_change_no_bit

RAGGED = Problem(T=5, k=3, E=5, H=300, I=17, imbalance="some_skipped")
WHOLE = Problem(T=5, E=5, H=320, I=64, imbalance="some_empty")


@pytest.fixture
def way(triton_kernel, monkeypatch):
    regime = importlib.import_module(f"{triton_kernel.__name__}.regime")
    return lambda name: monkeypatch.setattr(regime, "regime", lambda *_: name)


def layer_of(
    launchers, problem: Problem, adapted: bool, dtype: torch.dtype, quantization: Optional[Quantization] = None
) -> AdaptedLayer:
    """With trained adapters and dropout, or without either."""
    layer = AdaptedLayer(launchers, problem, Adapter(halves=2), dtype, 0.4 * adapted, quantization=quantization)
    if not adapted:
        layer.factors = {}
    return layer


@pytest.mark.parametrize(
    ("problem", "dtype", "adapted"),
    [
        (RAGGED, torch.float16, True),
        (RAGGED, torch.float32, False),
        (WHOLE, torch.float16, True),
        (Problem(T=1, k=4, H=129), torch.float16, False),
    ],
    ids=repr,
)
def test_of_dense_weights(triton_kernel, launchers, problem, dtype, adapted):
    assert_halves_change_no_bit(triton_kernel, layer_of(launchers, problem, adapted, dtype))


@pytest.mark.parametrize("adapted", [True, False], ids=["adapters", "none"])
def test_of_4_bit_weights(triton_kernel, launchers, way, adapted):
    way("plain")
    layer = layer_of(launchers, WHOLE, adapted, torch.float16, Quantization())
    assert_halves_change_no_bit(triton_kernel, layer)
