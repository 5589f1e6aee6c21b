"""Fixtures of the integration's tests: the built kernel as a source, and fresh random numbers with their seed."""

import logging
import secrets

import pytest
import torch
from kernels import use_kernel_mapping

from qwen3_moe_integration import KernelSource, register


@pytest.fixture(scope="session")
def source(kernel_dir) -> KernelSource:
    return KernelSource(path=kernel_dir)


@pytest.fixture
def registered(source):
    """The kernel is known to Transformers; its layer mapping is forgotten after the test."""
    with use_kernel_mapping({}, inherit_mapping=False):
        register(source)
        yield


@pytest.fixture(autouse=True)
def seed() -> int:
    seed = secrets.randbelow(2**31)
    print(f"torch.manual_seed({seed})")
    torch.manual_seed(seed)
    return seed


@pytest.fixture
def fused(monkeypatch) -> list[torch.dtype]:
    """The dtypes of the inputs of linear layers that were multiplied here and not by PEFT."""
    lora_linear = pytest.importorskip("qwen3_moe_integration.lora_linear")
    seen, forward = [], lora_linear._AddLora.forward
    spy = staticmethod(lambda ctx, x, *others: seen.append(x.dtype) or forward(ctx, x, *others))
    monkeypatch.setattr(lora_linear._AddLora, "forward", spy)
    return seen


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    """The lines that the integration has warned with, as if it had warned of nothing before."""
    lines = []
    logger = logging.getLogger("qwen3_moe_integration.experts")
    monkeypatch.setattr(logger, "warning", lambda line, *_, **__: lines.append(line))
    logging.Logger.warning_once.cache_clear()
    return lines
