"""The paths that 4-bit experts are multiplied by, against each other; and what none of them may read."""

import importlib
from dataclasses import replace
from unittest import mock

import pytest
import torch

from ..adapted import Quantization
from ..oracle import RATIO, assert_close
from ..poison import poisoned_memory
from ..problems import Problem
from ..steps import Step, assert_same_bits
from .shapes import FEW_EXPERTS, real

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16]
ODD = Problem(T=77, k=3, E=7, H=384, I=640, imbalance="some_skipped")
"""Widths of an odd number of whole tiles each."""

AT_THE_EDGES = [  # rows per tile; experts, so many that the average asks for such tiles; how they are quantized
    (16, 48, dict()),
    (16, 30, dict()),  # whose tiles in backward have fewer columns
    (32, 32, dict(nested=False, blocksize=128)),
    (64, 24, dict(blocksize=256)),
    (128, 9, dict(nested=False)),
]


def at_the_edges(block_m: int, experts: int) -> tuple[Problem, torch.Tensor]:
    """A problem, and its top_k_index: experts have no row, one, half a tile of them or one more, a tile or two, or one
    more or less. Some slots are to be skipped."""
    sizes = (1, block_m // 2, block_m // 2 + 1, block_m - 1, block_m, block_m + 1, 2 * block_m - 1, 2 * block_m)
    skipped = FEW_EXPERTS.k + -sum(sizes) % FEW_EXPERTS.k
    problem = replace(FEW_EXPERTS, T=(sum(sizes) + skipped) // FEW_EXPERTS.k, E=experts)
    g = problem.generator("cpu")
    chosen = torch.randperm(experts, generator=g)[: len(sizes)].repeat_interleave(torch.tensor(sizes))
    index = torch.cat((chosen, chosen.new_full((skipped,), experts)))
    return problem, index[torch.randperm(len(index), generator=g)].view(-1, FEW_EXPERTS.k)


def assert_fast_is_plain(plans: list, way, step: Step, dtype: torch.dtype, block_m: int) -> None:
    """What the fast path, which the layer takes by itself, and the plain one compute; fast in tiles of ``block_m``."""
    fast = from_poison(step)
    assert {(plan.path, plan.block_m) for plan in plans} == {("fast", block_m)}
    plans.clear()
    way("plain")
    plain = from_poison(step)
    assert {plan.path for plan in plans} == {"plain"}
    for name, want in plain.items():
        assert_close(f"{name} by the fast path", want, fast[name], RATIO[dtype])


def from_poison(step: Step) -> dict[str, torch.Tensor]:
    torch.cuda.empty_cache()  # or memory that is handed out again could hold the right results
    with poisoned_memory(step.hidden_states.device.type):
        return step()


@pytest.mark.parametrize("imbalance", ["some_skipped", "some_empty", "one_takes_all"])
@pytest.mark.parametrize("experts_at_a_time", [1, 3])
def test_odd_runs_of_decoded_experts_change_no_bit(kernel, way, forget, monkeypatch, experts_at_a_time, imbalance):
    """Decoded some at a time, whose tiles each launch finds on the device; or all at once."""
    way("dequantize")
    regime, experts = (importlib.import_module(f"{kernel.__name__}.{name}") for name in ("regime", "kernels.experts"))
    step = Step(kernel, replace(ODD, T=700, imbalance=imbalance), "cuda", torch.bfloat16, Quantization())
    at_once = from_poison(step)
    monkeypatch.setattr(regime, "LARGE_SCRATCH", experts_at_a_time * ODD.H * ODD.I * 2)
    monkeypatch.setattr(regime, "SCRATCH", experts_at_a_time * ODD.H * ODD.I * 2)
    forget()
    with mock.patch.object(experts, "linear_tiles", side_effect=experts.linear_tiles) as products:
        in_runs = from_poison(step)
    assert all(product.args[1].shape[0] <= experts_at_a_time for product in products.call_args_list)
    assert len(products.call_args_list) >= 2 * ODD.E / experts_at_a_time
    assert_same_bits(at_once, in_runs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(("block_m", "experts", "settings"), AT_THE_EDGES, ids=str)
def test_fast_is_plain_at_the_edges_of_tiles(kernel, plans, way, block_m, experts, settings, quant_type, dtype):
    problem, index = at_the_edges(block_m, experts)
    step = Step(kernel, problem, "cuda", dtype, Quantization(quant_type, **settings))
    step.top_k_index.copy_(index)
    assert_fast_is_plain(plans, way, step, dtype, block_m)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_fast_is_plain_at_odd_sizes(kernel, plans, way, quant_type, dtype):
    step = Step(kernel, ODD, "cuda", dtype, Quantization(quant_type, blocksize=128))
    assert_fast_is_plain(plans, way, step, dtype, block_m=64)


@pytest.mark.parametrize("ways", [("dequantize", "fast"), ("fast", "dequantize")], ids=str)
@pytest.mark.parametrize("tokens", [32, 700])
def test_each_direction_may_go_a_way_of_its_own(kernel, plans, way, forget, monkeypatch, tokens, ways):
    """With few tokens in tiles of its own too, so that backward cannot read the table of forward's."""
    regime = importlib.import_module(f"{kernel.__name__}.regime")
    step = Step(kernel, replace(ODD, T=tokens), "cuda", torch.bfloat16, Quantization())
    monkeypatch.setattr(regime, "regime", lambda *arguments: ways[arguments[4]])
    forget()
    mixed = from_poison(step)
    assert (plans[0].path, plans[-1].path) == ways
    assert tokens > 32 or plans[0].block_m != plans[-1].block_m
    way("plain")
    for name, want in from_poison(step).items():
        assert_close(f"{name} by {ways}", want, mixed[name], RATIO[torch.bfloat16])


def spoil(step: Step, experts: torch.Tensor) -> None:
    """Makes NaN of all scales of the experts (E,) that are true, so that what reads one of their weights is NaN."""
    for weight in step.stacks:
        scales = weight.nested_absmax if weight.nested_blocksize else weight.absmax
        scales.view(len(experts), -1)[experts] = torch.nan


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain scales"])
@pytest.mark.parametrize(
    ("tokens", "path"), [(1, "gemv"), (3, "gemv"), (16, "fast"), (16, "plain"), (16, "dequantize")]
)
def test_experts_that_no_token_chose_are_not_read(kernel, plans, request, tokens, path, nested):
    if path in ("plain", "dequantize"):
        request.getfixturevalue("way")(path)
    step = Step(kernel, real(tokens), "cuda", torch.bfloat16, Quantization(nested=nested))
    expected, trained = step.inference(), step()
    assert plans[0].path == path and (path == "gemv" or {plan.path for plan in plans} == {path})
    chosen = step.top_k_index.new_zeros(real(tokens).E, dtype=torch.bool)
    chosen[step.top_k_index] = True
    assert not chosen.all()
    spoil(step, ~chosen)
    for _ in range(3):  # by the code, or replayed
        assert_same_bits(expected, step.inference())
        assert_same_bits(trained, step())
    spoil(step, chosen)
    assert step.inference()["output"].isnan().any(), "the scales of chosen experts are read"
