"""Ranks to run on, and a checkpoint to load there."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.integration import quantized

from .ranks import run_on_gpus, run_on_ranks, start_server


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
def on_ranks(server, seed) -> Callable:
    """``on_ranks(number, function, *arguments)``: what the function returns on each rank."""
    return partial(run_on_ranks, seed=seed)


@pytest.fixture
def on_two_ranks(on_ranks) -> Callable:
    return partial(on_ranks, 2)


@pytest.fixture
def on_two_gpus(seed, tmp_path) -> Callable:
    """``on_two_gpus(function, *arguments)``, with ``device="cuda"`` beside the arguments."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    return partial(run_on_gpus, 2, seed=seed, address=f"file://{tmp_path / 'meeting'}")
