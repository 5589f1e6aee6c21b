"""The second product in halves of its columns, against all of them at once: no bit may differ."""

import importlib
from types import ModuleType
from unittest import mock

import torch

from .adapted import AdaptedLayer


def assert_halves_change_no_bit(kernel: ModuleType, layer: AdaptedLayer) -> None:
    """In the output and the gradients of ``layer``, whose columns are more than a block."""
    regime, experts = (importlib.import_module(f"{kernel.__name__}.{name}") for name in ("regime", "kernels.experts"))
    with mock.patch.object(regime, "WINDOW", 2**60):
        whole = layer.run(experts.experts_forward, experts.experts_backward)
    with (
        mock.patch.object(regime, "WINDOW", 0),
        mock.patch.object(experts, "linear_tiles", side_effect=experts.linear_tiles) as products,
    ):
        pairs = layer.pairs(whole, experts.experts_forward, experts.experts_backward)
    for name, want, got in pairs:
        assert torch.isfinite(want).all() and torch.equal(want, got), name
    # How many there are says nothing: a call that finds a kernel missing is given up, rehearsed and made again.
    columns = layer.inputs.hidden_states.shape[1]
    directions = {
        (product.kwargs.get("transposed", False), product.args[6].shape[1] < columns)
        for product in products.call_args_list
    }
    assert directions == {(False, True), (True, True)}, "some product, forward or backward, was not in halves"
