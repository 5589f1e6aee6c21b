"""What hypothesis draws: problems of any shape and balance, and a layout for every argument."""

from dataclasses import replace

import torch
from hypothesis import strategies as st

from .adapted import Quantization
from .oracle import ACTIVATIONS
from .problems import BALANCES, LAYOUTS, SKIPPING, ExpertsInputs, LinearInputs, LinearProblem, Problem

SEEDS = st.integers(0, 2**31 - 1)


def dtypes(*names: torch.dtype) -> st.SearchStrategy[torch.dtype]:
    return st.sampled_from(names)


def sizes(widest: int) -> st.SearchStrategy[int]:
    """Of a matrix; often thinner than a tensor core's tile."""
    return st.integers(1, min(16, widest)) | st.integers(1, widest)


@st.composite
def expert_problems(draw: st.DrawFn, most_tokens: int = 40, widest: int = 70) -> Problem:
    experts = draw(st.integers(1, 9))
    return Problem(
        T=draw(st.integers(0, most_tokens)),
        k=draw(st.integers(1, min(experts, 4))),
        E=experts,
        H=draw(sizes(widest)),
        I=draw(sizes(widest)),
        imbalance=draw(st.sampled_from(BALANCES + SKIPPING)),
        activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
        seed=draw(SEEDS),
    )


def even_problems(most_tokens: int = 40, widest: int = 70) -> st.SearchStrategy[Problem]:
    """Those whose weights can be in 4 bit: two of a row share a byte."""
    problems = expert_problems(most_tokens, widest)
    return problems.map(lambda problem: replace(problem, H=problem.H + problem.H % 2, I=problem.I + problem.I % 2))


def quantizations() -> st.SearchStrategy[Quantization]:
    """Any that bitsandbytes has: blocks may be less than a row, straddle two, or hold several matrices."""
    blocksizes = st.sampled_from([2**i for i in range(5, 13)])
    return st.builds(Quantization, st.sampled_from(["nf4", "fp4"]), blocksizes, st.booleans())


@st.composite
def linear_problems(draw: st.DrawFn, most_rows: int = 80, widest: int = 70) -> LinearProblem:
    return LinearProblem(
        M=draw(st.integers(0, most_rows)),
        N=draw(sizes(widest)),
        K=draw(sizes(widest)),
        E=draw(st.integers(1, 9)),
        imbalance=draw(st.sampled_from(BALANCES)),
        seed=draw(SEEDS),
    )


def expert_layouts() -> st.SearchStrategy[dict[str, str]]:
    return _layouts(ExpertsInputs._fields)


def linear_layouts() -> st.SearchStrategy[dict[str, str]]:
    """All but an expanded m_sizes, which would not sum to M."""
    return _layouts(LinearInputs._fields, m_sizes=("contiguous", "padded", "transposed"))


def _layouts(names: tuple[str, ...], **narrowed: tuple[str, ...]) -> st.SearchStrategy[dict[str, str]]:
    return st.fixed_dictionaries({name: st.sampled_from(narrowed.get(name, LAYOUTS)) for name in names})
