"""Two ranks for every test of this folder."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.integration import quantized

from .ranks import run_on_ranks, start_server


@pytest.fixture(scope="session")
def server() -> None:
    start_server()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A model in full precision, as one downloads it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    quantized.checkpoint(folder, **quantized.SIZES)
    return folder


@pytest.fixture
def on_two_ranks(server, seed) -> Callable:
    """``on_two_ranks(function, *arguments)``: what the function returns on either rank."""
    return partial(run_on_ranks, seed=seed)
