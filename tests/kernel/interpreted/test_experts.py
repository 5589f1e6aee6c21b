"""fused_experts and its gradients through the Triton kernels."""

import importlib
import itertools

import pytest
import torch
from hypothesis import given, settings

from .. import strategies
from ..agreement import assert_experts_agree, assert_stray_id_is_skipped, assert_sums_over_nothing_are_zero
from ..oracle import RATIO, assert_close
from ..poison import poisoned_memory
from ..problems import BALANCES, LAYOUTS, NOTHING, SKIPPING, Problem

PROBLEMS = [
    *(Problem(T=17, k=3, E=5, H=40, I=33, imbalance=imbalance) for imbalance in BALANCES + SKIPPING),
    Problem(T=1, k=4),
    Problem(T=0),
    Problem(T=9, H=64, I=64),  # no ragged block
    Problem(T=400, k=1, E=2, H=17, I=17),  # enough rows per expert for the largest tiles
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=repr)
def test_the_layer_and_its_gradients_are_the_oracles(triton_kernel, problem, dtype):
    assert_experts_agree(triton_kernel, problem, "cpu", dtype)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_every_activation_and_its_slope(triton_kernel, activation):
    assert_experts_agree(triton_kernel, Problem(activation=activation), "cpu", torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("argument", ["top_k_weights", "the others"])
def test_any_strides_give_the_same(triton_kernel, argument, layout):
    names = {"hidden_states", "top_k_index", "gate_up_proj", "down_proj", "grad_output"}
    names = {"top_k_weights"} if argument == "top_k_weights" else names
    assert_experts_agree(triton_kernel, Problem(), "cpu", torch.float32, dict.fromkeys(names, layout))


@settings(max_examples=40)
@given(
    strategies.expert_problems(most_tokens=12, widest=40),
    strategies.dtypes(torch.float32, torch.float16),
    strategies.expert_layouts(),
)
def test_any_problem_agrees_with_the_oracle(triton_kernel, problem, dtype, layouts):
    assert_experts_agree(triton_kernel, problem, "cpu", dtype, layouts)


@pytest.mark.parametrize("card", ["NVIDIA H200", "one without a table"])
def test_the_tiles_of_a_large_card(kernel, triton_kernel, monkeypatch, card):
    """Where they are larger than registers hold, backward goes through the activation in pieces."""
    tiling = importlib.import_module(f"{kernel.__name__}.tiling")
    monkeypatch.setattr(tiling, "_card", lambda device: (card, 227 * 1024))
    assert_experts_agree(triton_kernel, Problem(T=60, k=1, E=2, H=17, I=130), "cpu", torch.float16)


@pytest.mark.parametrize("stray", [-1, 5, 2**32])
def test_an_id_outside_the_experts_counts_as_one_to_skip(triton_kernel, stray):
    assert_stray_id_is_skipped(triton_kernel, Problem(), "cpu", stray)


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
@pytest.mark.parametrize("sizes", NOTHING, ids=repr)
def test_sums_over_nothing_are_zero(triton_kernel, sizes, adapted):
    assert_sums_over_nothing_are_zero(triton_kernel, sizes, adapted)


def test_tokens_that_are_far_from_themselves_are_copied_first(triton_kernel, monkeypatch):
    """And their gradients, both transposed, as if offsets in 32 bits reached less far."""
    experts, product = (
        importlib.import_module(f"{triton_kernel.__name__}.kernels.{x}") for x in ("experts", "product")
    )
    problem, seen = Problem(), []
    monkeypatch.setattr(product, "REACH", problem.H * problem.T)
    for name in ("gate_up", "down_backward"):
        launch = getattr(experts, name)
        spy = lambda rows, *rest, launch=launch: seen.append(rows) or launch(rows, *rest)  # noqa: E731
        monkeypatch.setattr(experts, name, spy)
    layouts = {"hidden_states": "transposed", "grad_output": "transposed"}
    assert_experts_agree(triton_kernel, problem, "cpu", torch.float32, layouts)
    assert [rows.is_contiguous() for rows in seen] == [True, True]


@pytest.mark.parametrize("save", [True, False])
def test_forward_fills_the_pre_activation_only_to_save_it(launchers, save):
    problem = Problem(imbalance="some_skipped")
    inputs = problem.draw("cpu", torch.float32)
    with poisoned_memory("cpu"):
        _, pre_activation, *_, routed = _forward(launchers, inputs, save)
    assert (pre_activation is not None) == save
    if save:
        assert pre_activation.shape == (problem.T * problem.k, 2 * problem.I)
        order, m_sizes = launchers.order_of(routed, problem.T * problem.k, problem.E)
        rows = int(m_sizes.sum())
        slot = order[:rows].long()
        x, w = inputs.hidden_states[slot // problem.k], inputs.gate_up_proj[inputs.top_k_index.flatten()[slot]]
        ref = torch.einsum("bh,boh->bo", x.double(), w.double())
        assert_close("pre_activation", ref, pre_activation[:rows], RATIO[torch.float32])


def test_the_pre_activation_is_saved_where_asked(launchers):
    inputs = Problem().draw("cpu", torch.float32)
    out, want, *_ = _forward(launchers, inputs, save=True)
    place = torch.full_like(want, torch.nan)
    with poisoned_memory("cpu"):
        again, pre_activation, *_ = _forward(launchers, inputs, True, True, place)
    assert pre_activation is place and torch.equal(place, want) and torch.equal(again, out)


@pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=3)))
def test_backward_computes_only_what_is_asked_for(launchers, wanted):
    inputs = Problem(T=5).draw("cpu", torch.float16, weights_dtype=torch.float32)
    _, *saved = _forward(launchers, inputs, save=True)
    hidden, gate_up, down = wanted
    asked = launchers.Gradients(hidden, True, gate_up, down, False, False, False, False)
    with poisoned_memory("cpu"):
        grads = launchers.experts_backward(inputs.grad_output, *_layer(launchers, inputs), saved, "silu", asked)
    assert [grad is not None for grad in grads] == list(asked)
    dtypes = torch.float16, torch.float32, torch.float16, torch.float16
    assert all(grad.dtype == dtype for grad, dtype in zip(grads, dtypes) if grad is not None)


def _forward(launchers, inputs, save, *rest):
    return launchers.experts_forward(*_layer(launchers, inputs), "silu", save, *rest)


def _layer(launchers, inputs):
    """Tokens, projections and seed, as the launchers take them."""
    *tokens, gate_up, down, _ = inputs
    return (*tokens, launchers.Projection(gate_up), launchers.Projection(down), None)
