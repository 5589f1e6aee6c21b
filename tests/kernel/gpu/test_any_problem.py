"""Any sizes, strides, dtype and balance, drawn anew in every run, against the oracle.

Each set of sizes, strides and a dtype has kernels of its own, which take seconds to compile. So an example is one such
set with several draws of what it leaves open, which are the numbers and how rows fall to experts. A failing example is
not made smaller, for each attempt would compile.
"""

import gc
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from .. import strategies
from ..agreement import assert_experts_agree, assert_linear_agrees
from ..problems import BALANCES, SKIPPING

pytestmark = pytest.mark.gpu

DRAWS = 6
DTYPES = strategies.dtypes(torch.bfloat16, torch.float16, torch.float32)
UNSHRUNK = (Phase.explicit, Phase.reuse, Phase.generate)


@pytest.fixture(autouse=True)
def no_garbage_collection() -> Iterator[None]:
    """Hypothesis has a callback in it, and before Python 3.11.8 and 3.12.2 one that runs within ``ast.parse``, as
    Triton's compiler calls it, makes that fail (python/cpython#106905)."""
    gc.disable()
    yield
    gc.enable()


def _draws(balances: tuple[str, ...]) -> st.SearchStrategy[list[tuple[str, int]]]:
    return st.lists(st.tuples(st.sampled_from(balances), strategies.SEEDS), min_size=DRAWS, max_size=DRAWS)


@settings(max_examples=10, phases=UNSHRUNK)
@given(strategies.linear_problems(300, 150), DTYPES, strategies.linear_layouts(), _draws(BALANCES))
def test_any_linear_layer(kernel, problem, dtype, layouts, draws):
    for imbalance, seed in draws:
        assert_linear_agrees(kernel, replace(problem, imbalance=imbalance, seed=seed), "cuda", dtype, layouts)


@settings(max_examples=8, phases=UNSHRUNK)
@given(strategies.expert_problems(100, 150), DTYPES, strategies.expert_layouts(), _draws(BALANCES + SKIPPING))
def test_any_experts_layer(kernel, problem, dtype, layouts, draws):
    for imbalance, seed in draws:
        assert_experts_agree(kernel, replace(problem, imbalance=imbalance, seed=seed), "cuda", dtype, layouts)
