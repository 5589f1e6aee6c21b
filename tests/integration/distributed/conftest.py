"""Two ranks for every test of this folder."""

from collections.abc import Callable
from functools import partial

import pytest

from .ranks import run_on_ranks, start_server


@pytest.fixture(scope="session")
def server() -> None:
    start_server()


@pytest.fixture
def on_two_ranks(server, seed) -> Callable:
    """``on_two_ranks(function, *arguments)``: what the function returns on either rank."""
    return partial(run_on_ranks, seed=seed)
