"""The few widths that the GPU tests compile kernels for."""

from dataclasses import replace

from ..problems import LinearProblem, Problem

REAL = Problem(T=300, k=8, E=128, H=2048, I=768)
"""Qwen3-30B-A3B."""

FEW_EXPERTS = Problem(T=160, k=8, E=16, H=2048, I=768)
"""The same widths with few experts, so that few tokens give each of them many rows."""

ODD = Problem(T=50, k=3, E=7, H=77, I=45)
"""No dimension is a multiple of anything; no row but the first is aligned."""

DEEP = Problem(T=520, k=4, E=8, H=256, I=192)
"""Enough rows per expert for the largest tiles."""

ODD_LINEAR = LinearProblem(M=90, N=45, K=77, E=7)


def real(tokens: int) -> Problem:
    return replace(REAL, T=tokens)
