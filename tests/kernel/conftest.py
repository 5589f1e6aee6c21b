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
    monkeypatch.setattr(launch, "_launchers", {})
    yield absent_card
    form.forget()


@pytest.fixture
def replays(kernel, monkeypatch) -> list[bool]:
    """Of each call for which there is a record, whether it was replayed."""
    record, found = importlib.import_module(f"{kernel.__name__}.kernels.record").Record, []
    replay = record.replay

    def noted(self, tensors):
        results = replay(self, tensors)
        found.append(results is not None)
        return results

    monkeypatch.setattr(record, "replay", noted)
    importlib.import_module(f"{kernel.__name__}.form").forget()
    return found


@pytest.fixture
def fast(kernel, monkeypatch) -> None:
    """The card decodes 4-bit weights in registers."""
    regime = importlib.import_module(f"{kernel.__name__}.regime")
    monkeypatch.setattr(regime, "has_byte_permute", lambda device: True)
    monkeypatch.setattr(regime, "_fits_fast", lambda weight: True)


@pytest.fixture
def many(kernel, monkeypatch) -> None:
    """A card that reads weights by descriptors, a second product in halves, and weights decoded in several parts."""
    regime = importlib.import_module(f"{kernel.__name__}.regime")
    product, experts = (importlib.import_module(f"{kernel.__name__}.kernels.{name}") for name in ("product", "experts"))
    monkeypatch.setattr(product, "_has_tma", lambda device: True)
    monkeypatch.setattr(experts, "window", lambda slots, columns, *rest: columns // 2)
    monkeypatch.setattr(regime, "LARGE_SCRATCH", 0)
    monkeypatch.setattr(regime, "SCRATCH", 0)
