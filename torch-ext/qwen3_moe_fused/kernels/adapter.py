"""A call's adapters: which of the kernels in ``lora`` run when, on what."""

from typing import NamedTuple, Optional, Tuple

import torch

from ..projection import Lora, Projection
from ..tiling import Narrow, cdiv, choose_narrow, next_power_of_2
from .launch import launch
from .lora import (
    Addition,
    Factor,
    FactorPointers,
    drop_bound,
    factor_grads_kernel,
    low_rank_kernel,
    repack_kernel,
)

Tensor = torch.Tensor


class Adapter(NamedTuple):
    """The adapter of one projection during a call, and how the call has sorted its rows."""

    lora: Lora
    dtype: torch.dtype
    stream: int
    seed: Optional[Tensor]
    top_k: int
    order: Tensor
    tiles: Tensor
    block_m: int
    narrow: Narrow

    def forward_addition(self, x: Tensor, by_token: bool = False, permuted: bool = False) -> Addition:
        """What the projection of x (M, K), or (T, K) by token, gets added; ``permuted`` as in ``four_bit_fast``."""
        low_rank = self._low_rank(x, self._factor_a(), by_token, permuted, self.lora.dropout)
        return Addition(low_rank, self._factor_b())

    def backward_addition(self, grad: Tensor, by_token: bool = False) -> Addition:
        """What the gradient of the projection's input gets added, from that of its result (M, N)."""
        low_rank = self._low_rank(grad, self._factor_b(), by_token)
        return Addition(low_rank, self._factor_a(), self.seed, self.lora.dropout, self.stream)

    def factor_grads(
        self,
        x: Optional[Tensor],
        grad: Tensor,
        low_rank: Tensor,
        grad_low_rank: Tensor,
        offsets: Tensor,
        wanted: Tuple[bool, bool],
        x_by_token: bool = False,
        weights: Optional[Tensor] = None,
    ) -> Tuple[Optional[Tensor], Optional[Tensor]]:
        """The gradients of A and B, None if not wanted.

        Args:
            x: the projection's input (M, K), or (T, K) by token; each row times its routing weight if ``weights`` are
                given; None if only B's is wanted.
            grad: the gradient of its result (M, N); if ``weights`` (T, k) are given (T, N), before they apply.
            low_rank, grad_low_rank: (M, R), of the two additions.
        """
        (A, B, *_), halves = self.lora, self.lora.halves
        grad_A, grad_B = (f.new_empty(f.shape) if asked else None for f, asked in zip((A, B), wanted))
        columns, k, n, rank = A.shape[1], A.shape[2], B.shape[1], B.shape[2]
        tile, rows = self.narrow.factor_grads.fit(columns, max(k, n)), self.narrow.grad_rows
        blocks_a = cdiv(columns, tile.block_n) * cdiv(k, tile.block_k) if wanted[0] else 0
        blocks_b = cdiv(rank, tile.block_n) * cdiv(n // halves, tile.block_k) * halves if wanted[1] else 0
        x_strides, weight_strides = ((0, 0) if t is None else t.stride() for t in (x, weights))
        launch(
            factor_grads_kernel, (blocks_a + blocks_b, A.shape[0]), tile.num_warps, tile.num_stages,
            (x, grad, low_rank, grad_low_rank, self.order, offsets, weights, self.seed, grad_A, grad_B), (),
            k, n, rank, halves, self.top_k, *x_strides, *grad.stride(), *weight_strides,
            x_by_token, weights is not None, drop_bound(self.lora.dropout), self.stream,
            rows, tile.block_n, tile.block_k,
        )  # fmt: skip
        return grad_A, grad_B

    def _low_rank(
        self, a: Tensor, factor: Factor, by_token: bool, permuted: bool = False, dropout: float = 0.0
    ) -> Tensor:
        """(M, R): scaling times rows of a times F."""
        pointers, n, rank, halves = factor
        columns = rank * halves
        out = a.new_empty(self.order.numel(), columns)
        tile, rows = self.narrow.low_rank.fit(columns, n), min(self.block_m, self.narrow.rows)
        pieces = self.block_m // rows
        grid = (self.tiles.shape[0] * pieces * cdiv(columns, tile.block_n),)
        launch(
            low_rank_kernel, grid, tile.num_warps, tile.num_stages,
            (a, pointers, self.order, self.tiles, self.seed, out), (pieces,), self.lora.scaling / (1.0 - dropout),
            n, rank, halves, self.top_k, *a.stride(), by_token, permuted, drop_bound(dropout), self.stream,
            rows, tile.block_n, tile.block_k,
        )  # fmt: skip
        return out

    def _factor_a(self) -> Factor:
        _, columns, k = self.lora.A.shape
        stride_e, stride_r, stride_k = self.lora.A.stride()
        return Factor(FactorPointers(self.lora.A, stride_e, stride_k, stride_r), k, columns, 1)

    def _factor_b(self) -> Factor:
        B = self.lora.B if 1 in self.lora.B.stride()[1:] else _repacked(self.lora.B, self.dtype)
        return Factor(FactorPointers(B, *B.stride()), *B.shape[1:], self.lora.halves)


def adapters(
    gate_up: Projection,
    down: Projection,
    dtype: torch.dtype,
    seed: Optional[Tensor],
    top_k: int,
    order: Tensor,
    tiles: Tensor,
    block_m: int,
) -> Tuple[Optional[Adapter], Optional[Adapter]]:
    """Those of both projections, each with a stream of its own for dropout."""
    found = []
    for stream, (weight, lora, _) in enumerate((gate_up, down)):
        if lora is not None:
            narrow = choose_narrow(
                order.numel(), weight.shape[0], lora.A.shape[1], lora.dropout > 0, dtype, order.device
            )
            lora = Adapter(lora, dtype, stream, seed, top_k, order, tiles, block_m, narrow)
        found.append(lora)
    return tuple(found)


def _repacked(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """factor (E, N, r) with r fastest. PEFT has experts fastest: no two elements of an expert share a sector of memory,
    and each tile of rows would read as many sectors as there are elements."""
    out = torch.empty(factor.shape, dtype=dtype, device=factor.device)
    experts, n, rank = factor.shape
    block, block_e = 64, min(64, next_power_of_2(experts))
    launch(
        repack_kernel, (cdiv(n * rank, block), cdiv(experts, block_e)), 4, 1,
        (factor, out), (), experts, n, rank, *factor.stride(), block, block_e,
    )  # fmt: skip
    return out
