"""The second product in windows of its columns, against all of them at once: no bit may differ."""

import importlib
from types import ModuleType
from unittest import mock

import torch

from .adapted import AdaptedLayer


def assert_windows_change_no_bit(kernel: ModuleType, layer: AdaptedLayer, columns: int) -> None:
    """Output and gradients of ``layer`` in windows of ``columns`` at most, or of one block if that is more."""
    regime, experts = (importlib.import_module(f"{kernel.__name__}.{name}") for name in ("regime", "kernels.experts"))
    hidden_states, index, *_ = layer.inputs
    slots, hidden = index.numel(), hidden_states.shape[1]
    with mock.patch.object(regime, "WINDOW", 2**60):
        whole = layer.run(experts.experts_forward, experts.experts_backward)
    with (
        mock.patch.object(regime, "WINDOW", slots * columns * hidden_states.element_size()),
        mock.patch.object(experts, "linear_tiles", side_effect=experts.linear_tiles) as products,
    ):
        pairs = layer.pairs(whole, experts.experts_forward, experts.experts_backward)
    for name, want, got in pairs:
        assert torch.isfinite(want).all() and torch.equal(want, got), name
    widths = [product.args[5].shape[1] for product in products.call_args_list]
    assert sum(widths) == 2 * hidden and len(widths) > 2, "forward and backward, each in more than one window"
