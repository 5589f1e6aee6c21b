"""What the GPU tests share."""

import importlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="session")
def launchers(kernel) -> SimpleNamespace:
    """The layer's two directions as the package calls them, and the types they take."""
    experts, projection = (
        importlib.import_module(f"{kernel.__name__}.{name}") for name in ("kernels.experts", "projection")
    )
    return SimpleNamespace(**{**vars(projection), **vars(experts)}, four_bit_weight=kernel.four_bit_weight)


@pytest.fixture
def forget(kernel) -> Iterator[Callable[[], None]]:
    """Makes the next calls run the code: none is replayed that was recorded before. Nor is one of this test's in
    others."""
    form = importlib.import_module(f"{kernel.__name__}.form")
    form.forget()
    yield form.forget
    form.forget()


@pytest.fixture
def way(kernel, monkeypatch, forget) -> Callable[[str], None]:
    """Makes the layer take the way called so, whatever its regime would say."""
    regime = importlib.import_module(f"{kernel.__name__}.regime")
    monkeypatch.setattr(regime, "GEMV_SLOTS", 0)

    def take(name: str) -> None:
        monkeypatch.setattr(regime, "regime", lambda *_: name)
        forget()

    return take


@pytest.fixture
def plans(kernel, monkeypatch, forget) -> list:
    """The plans of all calls that run the code, each direction's; for slots one by one, a plan whose path is gemv."""
    experts, regime = (importlib.import_module(f"{kernel.__name__}.{name}") for name in ("kernels.experts", "regime"))
    found, plan, of_few = [], experts.plan, experts._forward_of_few

    def planned(*arguments, **settings):
        found.append(plan(*arguments, **settings))
        return found[-1]

    def one_by_one(*arguments):
        found.append(regime.Plan("gemv", *[None] * (len(regime.Plan._fields) - 1)))
        return of_few(*arguments)

    monkeypatch.setattr(experts, "plan", planned)
    monkeypatch.setattr(experts, "_forward_of_few", one_by_one)
    return found
