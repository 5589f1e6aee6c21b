"""down and the gradient of hidden_states in halves of their columns, on a GPU."""

from dataclasses import replace

import pytest
import torch

from ..adapted import AdaptedLayer, Adapter, Quantization
from ..problems import Problem
from ..windows import assert_halves_change_no_bit
from .shapes import REAL, real

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
ADAPTER = Adapter(gate_up_rank=16, down_rank=16, dtype=torch.float32)
DEEP = Problem(T=520, k=4, E=8, H=640, I=384, imbalance="some_skipped")
"""High tiles, some of them half-empty, and a second half that is the smaller."""
RAGGED = Problem(T=50, k=3, E=7, H=601, I=45, imbalance="some_empty")
"""No row but the first is aligned."""


def check(kernel, launchers, problem, dtype, adapted, quantization=None):
    layer = AdaptedLayer(launchers, problem, ADAPTER, dtype, 0.3 * adapted, "cuda", quantization)
    if not adapted:
        layer.factors = {}
    assert_halves_change_no_bit(kernel, layer)


@pytest.mark.parametrize("adapted", [True, False], ids=["adapters", "none"])
@pytest.mark.parametrize("problem", [DEEP, RAGGED, real(2048)], ids=repr)
def test_of_dense_weights_no_bit_differs(kernel, launchers, problem, adapted, dtype):
    check(kernel, launchers, problem, dtype, adapted)


@pytest.mark.parametrize("adapted", [True, False], ids=["adapters", "none"])
@pytest.mark.parametrize("name", ["fast", "plain"])
@pytest.mark.parametrize("problem", [DEEP, replace(DEEP, T=24), replace(REAL, imbalance="one_takes_all")], ids=repr)
def test_of_4_bit_weights_no_bit_differs(kernel, launchers, way, problem, name, adapted):
    way(name)
    check(kernel, launchers, problem, BF16, adapted, Quantization())
