"""What the GPU tests share."""

import importlib
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="session")
def launchers(kernel) -> SimpleNamespace:
    """The layer's two directions as the package calls them, and the types they take."""
    experts, projection = (
        importlib.import_module(f"{kernel.__name__}.{name}") for name in ("kernels.experts", "projection")
    )
    return SimpleNamespace(**{**vars(projection), **vars(experts)}, four_bit_weight=kernel.four_bit_weight)
