"""down and the gradient of hidden_states a window of columns at a time, on a GPU."""

import importlib
from dataclasses import replace

import pytest
import torch

from ..adapted import AdaptedLayer, Adapter, Quantization
from ..problems import Problem
from ..windows import assert_windows_change_no_bit
from .shapes import REAL, real

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
ADAPTER = Adapter(gate_up_rank=16, down_rank=16, dtype=torch.float32)
DEEP = Problem(
    T=520, k=4, E=8, H=640, I=384, imbalance="some_skipped"
)  # high tiles, half-empty ones, a last window of half
RAGGED = Problem(T=50, k=3, E=7, H=601, I=45, imbalance="some_empty")  # no row but the first is aligned


@pytest.fixture
def way(kernel, monkeypatch):
    regime = importlib.import_module(f"{kernel.__name__}.regime")
    return lambda name: monkeypatch.setattr(regime, "regime", lambda *_: name)


def check(kernel, launchers, problem, dtype, columns, adapted, quantization=None):
    layer = AdaptedLayer(launchers, problem, ADAPTER, dtype, 0.3 * adapted, "cuda", quantization)
    if not adapted:
        layer.factors = {}
    assert_windows_change_no_bit(kernel, layer, columns)


@pytest.mark.parametrize("adapted", [True, False], ids=["adapters", "none"])
@pytest.mark.parametrize("problem", [DEEP, RAGGED, real(2048)], ids=repr)
def test_of_dense_weights_no_bit_differs(kernel, launchers, problem, adapted, dtype):
    for columns in (1, problem.H // 2):
        check(kernel, launchers, problem, dtype, columns, adapted)


@pytest.mark.parametrize("adapted", [True, False], ids=["adapters", "none"])
@pytest.mark.parametrize("name", ["fast", "plain"])
@pytest.mark.parametrize("problem", [DEEP, replace(DEEP, T=24), replace(REAL, imbalance="one_takes_all")], ids=repr)
def test_of_4_bit_weights_no_bit_differs(kernel, launchers, way, problem, name, adapted):
    way(name)
    for columns in (1, problem.H // 2):
        check(kernel, launchers, problem, BF16, columns, adapted, Quantization())


def test_a_captured_step_in_windows_replays(kernel, monkeypatch):
    monkeypatch.setattr(importlib.import_module(f"{kernel.__name__}.regime"), "WINDOW", 1)
    inputs = REAL.draw("cuda", BF16)
    leaves = [x.requires_grad_() if i in (0, 2) else x for i, x in enumerate(inputs[:-1])]

    def step():
        out = kernel.fused_experts(*leaves)
        return out, *torch.autograd.grad(out, (leaves[0], leaves[2]), inputs.grad_output)

    expected = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    graph.replay()
    assert all(map(torch.equal, expected, results))
