"""Adapters through the Triton kernels, with and without dropout, against the oracle and the package's CPU reference."""

import importlib
import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from .. import strategies
from ..adapted import FACTORS, AdaptedLayer, Adapter, Quantization, assert_adapted_experts_agree
from ..oracle import RATIO, assert_close
from ..poison import poisoned_memory
from ..problems import Problem

ODD = Problem(T=21, k=3, E=5, H=40, I=33, imbalance="some_skipped")
SMALL = Problem(T=8, E=2)
ADAPTERS = [
    Adapter(halves=2),
    Adapter(gate_up_rank=1, down_rank=16, scaling=3.0),
    Adapter(gate_up_rank=33, down_rank=1, halves=2),
    Adapter(gate_up_rank=16, down_rank=70),
]


@pytest.mark.parametrize("adapter", ADAPTERS, ids=repr)
def test_the_layer_and_its_gradients_are_the_oracles(triton_kernel, dtype, adapter):
    assert_adapted_experts_agree(triton_kernel, ODD, "cpu", dtype, adapter=adapter)


@pytest.mark.parametrize(
    "problem",
    [
        Problem(T=1, k=4),
        Problem(T=0),
        Problem(imbalance="all_skipped"),
        Problem(T=24, H=64, I=64, imbalance="some_empty"),  # no ragged block
        Problem(T=140, k=1, E=1, H=17, I=17),  # enough rows per expert for the largest tiles
    ],
    ids=repr,
)
def test_none_few_and_many_rows(triton_kernel, problem):
    assert_adapted_experts_agree(triton_kernel, problem, "cpu", torch.float16, adapter=Adapter(halves=2))


@pytest.mark.parametrize(("dtype", "factors"), [(torch.float16, torch.float32), (torch.float32, torch.float16)])
def test_factors_of_another_dtype(triton_kernel, dtype, factors):
    ratio = RATIO[torch.float16]
    assert_adapted_experts_agree(triton_kernel, ODD, "cpu", dtype, adapter=Adapter(dtype=factors), ratio=ratio)


@settings(max_examples=25)
@given(
    strategies.expert_problems(most_tokens=9, widest=40),
    strategies.dtypes(torch.float32, torch.float16),
    st.builds(Adapter, st.integers(1, 20), st.integers(1, 20), st.integers(1, 2), st.floats(0.25, 1)),
)
def test_any_problem_agrees_with_the_oracle(triton_kernel, problem, dtype, adapter):
    assert_adapted_experts_agree(triton_kernel, problem, "cpu", dtype, adapter=adapter)


PEFT = {  # how PEFT's target_parameters keep the factors of a stack: A expert-major, B with experts fastest
    "A": lambda A: A.reshape(-1, A.shape[2]).clone().view(A.shape),
    "B": lambda B: B.permute(1, 2, 0).reshape(B.shape[1], -1).clone().view(*B.shape[1:], B.shape[0]).permute(2, 0, 1),
}
CROSSED = dict.fromkeys("AB", lambda factor: factor.transpose(1, 2).contiguous().transpose(1, 2))
SPREAD = dict.fromkeys("AB", lambda factor: torch.stack((factor, factor * float("nan")), -1)[..., 0])


@pytest.mark.parametrize("stored", [PEFT, CROSSED, SPREAD], ids=["as PEFT does", "transposed", "every other element"])
@pytest.mark.parametrize("halves", [1, 2])
def test_any_strides_give_the_same(launchers, halves, stored):
    layer = AdaptedLayer(launchers, SMALL, Adapter(halves=halves))
    expected = layer.run(launchers.experts_forward, launchers.experts_backward)
    layer.factors = {name: stored[name[-1]](factor) for name, factor in layer.factors.items()}
    assert not all(factor.is_contiguous() for factor in layer.factors.values())
    for name, want, got in layer.pairs(expected, launchers.experts_forward, launchers.experts_backward):
        assert torch.equal(want, got), name


@pytest.mark.parametrize(
    ("problem", "quantization", "adapter"),
    [(ODD, None, Adapter(halves=2)), (replace(ODD, H=64, I=64), Quantization(), Adapter(gate_up_rank=20))],
    ids=["dense", "4 bit"],
)
def test_dropout_is_that_of_the_reference(kernel, launchers, dtype, problem, quantization, adapter):
    layer = AdaptedLayer(launchers, problem, adapter, dtype, 0.4, quantization=quantization)
    reference = kernel.reference
    expected = layer.run(reference.experts_forward, reference.experts_backward)
    for name, want, got in layer.pairs(expected, launchers.experts_forward, launchers.experts_backward):
        assert_close(name, want, got, RATIO[dtype])


@pytest.mark.parametrize("stream", [0, 1])
@pytest.mark.parametrize("dropout", [0.1, 0.75])
@pytest.mark.parametrize("seed", [0, 2**31 - 1])
def test_the_mask_is_bit_equal_to_the_references(kernel, launchers, seed, dropout, stream):
    """An adapter of rank H with A = 1 reads the mask of a token of ones out, element by element."""
    adapters = importlib.import_module(f"{kernel.__name__}.kernels.adapter").adapters
    slots, width = 37, 24
    seed = torch.tensor([seed])
    index = torch.randint(3, (slots, 1))
    order, _, _, tiles = launchers.routing(index, 3, 16)
    factors = launchers.Lora(torch.eye(width).repeat(3, 1, 1), torch.zeros(3, 8, width), 1.0 - dropout, dropout)
    pair = [launchers.Projection(torch.empty(3, 8, width), factors if i == stream else None) for i in range(2)]
    adapter = adapters(*pair, torch.float32, seed, 1, order, tiles, 16)[stream]
    kept = adapter.forward_addition(torch.ones(slots, width)).low_rank
    assert torch.equal(kept.round().bool(), kernel.reference.keep_mask(order, width, dropout, seed, stream))


def test_columns_that_were_permuted_for_4_bit_weights_meet_those_of_A(kernel, launchers):
    files = [importlib.import_module(f"{kernel.__name__}.kernels.{name}") for name in ("adapter", "four_bit_fast")]
    slots, width = 9, 128
    order, _, _, tiles = launchers.routing(torch.randint(3, (slots, 1)), 3, 16)
    factors = launchers.Lora(torch.randn(3, 5, width), torch.zeros(3, 8, 5), 1.0, 0.5)
    pair = launchers.Projection(torch.empty(3, 8, width)), launchers.Projection(torch.empty(3, 8, width), factors)
    adapter = files[0].adapters(*pair, torch.float32, torch.tensor([5]), 1, order, tiles, 16)[1]
    x = torch.randn(slots, width)
    ref, out = (adapter.forward_addition(t, permuted=t is not x).low_rank for t in (x, files[1].permuted(x)))
    assert_close("x A^T", ref, out, RATIO[torch.float32])


def test_backward_computes_only_what_is_asked_for(launchers):
    layer = AdaptedLayer(launchers, SMALL, Adapter(dtype=torch.float32), torch.float16)
    _, *saved = layer.forward(launchers.experts_forward)
    for wanted in itertools.product([True, False], repeat=4):
        asked = launchers.Gradients(wanted[0] != wanted[3], True, False, False, *wanted)
        with poisoned_memory("cpu"):
            grads = layer.backward(launchers.experts_backward, saved, asked)
        assert [grad is not None for grad in grads] == list(asked)
        assert all(grad.isfinite().all() for grad in grads if grad is not None)
        assert all(grad.dtype == torch.float32 for grad, asked in zip(grads[4:], wanted) if asked)


def test_one_projection_alone_may_have_an_adapter(launchers, kernel):
    for names in (FACTORS[:2], FACTORS[2:]):
        layer = AdaptedLayer(launchers, SMALL, Adapter())
        layer.factors = {name: factor for name, factor in layer.factors.items() if name in names}
        expected = layer.run(kernel.reference.experts_forward, kernel.reference.experts_backward)
        for name, want, got in layer.pairs(expected, launchers.experts_forward, launchers.experts_backward):
            assert_close(name, want, got, RATIO[torch.float32])


def test_forward_keeps_low_rank_rows_only_to_save_them(launchers):
    layer = AdaptedLayer(launchers, SMALL, Adapter(halves=2))
    out, *_ = layer.forward(launchers.experts_forward)
    again, *unsaved = layer.forward(launchers.experts_forward, save=False)
    assert torch.equal(out, again) and unsaved == [None] * 4
