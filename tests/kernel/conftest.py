"""A card that is not here, and Hypothesis: no deadline (a first example compiles or imports), and the shrunk example is
printed with its blob."""

import importlib
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile("kernel", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kernel")


@pytest.fixture
def absent_card(monkeypatch):
    """A driver without a card, which Triton compiles for."""
    from triton.runtime import driver

    from .absent import Compiler

    card = Compiler()
    monkeypatch.setattr(driver, "_active", card)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return card


@pytest.fixture
def compiler(kernel, absent_card, monkeypatch) -> Iterator:
    """The same, which compiles nothing."""
    import triton

    form, launch = (importlib.import_module(f"{kernel.__name__}.{name}") for name in ("form", "kernels.launch"))
    monkeypatch.setattr(triton.JITFunction, "_do_compile", lambda kernel, *args: absent_card.compile(kernel, *args))
    monkeypatch.setattr(launch, "_compiled", {})
    yield absent_card
    form.forget()
