"""Rows times the matrices of a run of experts: their tiles alone, which ``linear_tiles`` finds by offsets."""

import importlib
from unittest import mock

import pytest
import torch

from ..problems import BALANCES, LinearProblem

E, N = 5, 40  # of the columns, three blocks
RUNS = [range(1), range(2), range(2, 4), range(4, 5), range(5)]


class Product:
    """44 rows, the last four of no expert, times the matrices of five experts, or of some of them."""

    def __init__(self, kernel, launchers, imbalance: str = "random"):
        self.linear = importlib.import_module(f"{kernel.__name__}.kernels.linear")
        self.tile = importlib.import_module(f"{kernel.__name__}.tiling").Tile(16, 16, 4, 1)
        self.input, self.weight, m_sizes, _ = LinearProblem(44, N, 24, E, imbalance).draw("cpu", torch.float32)
        self.expert = torch.arange(E).repeat_interleave(m_sizes)
        m_sizes -= torch.bincount(self.expert[40:], minlength=E).int()
        self.expert[40:] = E
        self.offsets, self.tiles = launchers.tile_table(m_sizes, 44, 16, rest=-1)
        self.tiles[self.tiles[:, 0] < 0, 1:] = torch.tensor([40, 44], dtype=torch.int32)  # in vain, without an expert

    def of(self, run: range, cols: slice = slice(0, N), transposed: bool = False, scatter=None):
        """The product, in memory that held NaN, and how many programs computed it. In memory, other experts' matrices
        follow: who reads those of other rows too writes numbers."""
        out = torch.full((44, cols.stop - cols.start), torch.nan)
        weight = self.weight.mT.contiguous() if transposed else self.weight
        with mock.patch.object(self.linear, "launch", side_effect=self.linear.launch) as launch:
            self.linear.linear_tiles(
                self.input, weight[run.start : run.stop], self.offsets, self.tiles, 16, self.tile, out, scatter,
                first_expert=run.start, transposed=transposed, first_col=cols.start,
            )  # fmt: skip
        return out, launch.call_args.args[1][0]

    def reference(self, run: range, cols: slice = slice(0, N)) -> torch.Tensor:
        out = torch.full((44, N), torch.nan, dtype=torch.float64)
        for expert in run:
            own = self.expert == expert
            out[own] = self.input[own].double() @ self.weight[expert].double().T
        return out[:, cols]


def assert_equal(ref: torch.Tensor, out: torch.Tensor) -> None:
    torch.testing.assert_close(out.double(), ref, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("imbalance", BALANCES)
@pytest.mark.parametrize("run", RUNS, ids=str)
def test_a_run_fills_its_own_rows_alone(triton_kernel, launchers, run, imbalance):
    product = Product(triton_kernel, launchers, imbalance)
    assert_equal(product.reference(run), product.of(run)[0])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("cols", [slice(0, 16), slice(16, 40)], ids=["first", "rest"])
@pytest.mark.parametrize("run", RUNS, ids=str)
def test_a_window_of_its_columns_in_the_order_of_slots(triton_kernel, launchers, run, cols, transposed):
    product, order = Product(triton_kernel, launchers), torch.randperm(44)
    out, _ = product.of(run, cols, transposed, order.int())
    assert_equal(product.reference(run, cols), out[order])


@pytest.mark.parametrize("length", [1, 2, 3])
def test_runs_share_the_programs_of_all_experts(triton_kernel, launchers, length):
    """A block more each, rounded up: not all the tiles that there are for each run anew."""
    product = Product(triton_kernel, launchers)
    _, whole = product.of(range(E))
    runs = [range(first, min(first + length, E)) for first in range(0, E, length)]
    shared = [product.of(run)[1] for run in runs]
    assert whole <= sum(shared) < whole + 3 * len(runs)
