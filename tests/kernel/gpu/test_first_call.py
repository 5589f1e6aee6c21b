"""The first call on a card: Triton compiles in threads, and the kernels are those it compiles one after the other."""

import importlib
import pkgutil
import threading

import pytest
import torch
import triton
from triton import knobs
from triton.runtime import build

from ..problems import Problem

pytestmark = pytest.mark.gpu

PROBLEM = Problem(T=40, k=3, E=6, H=336, I=208)


@pytest.fixture
def compilations(kernel, monkeypatch, tmp_path) -> list[tuple[str, threading.Thread]]:
    """Every kernel that is compiled and the thread that does it, with nothing compiled before."""
    found = []

    def note(src, cache_hit: bool, **kwargs) -> None:
        if not cache_hit:
            found.append((src.fn.__name__, threading.current_thread()))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "together"))
    monkeypatch.setattr(knobs.compilation, "listener", note)
    _forget(kernel)
    return found


@pytest.fixture
def launchers(monkeypatch) -> list[threading.Thread]:
    """The thread of every launcher that is built."""
    found, build_library = [], build._build

    def note(name: str, *args) -> str:
        if name == "__triton_launcher":
            found.append(threading.current_thread())
        return build_library(name, *args)

    monkeypatch.setattr(build, "_build", note)
    return found


def _forget(kernel) -> None:
    package = importlib.import_module(f"{kernel.__name__}.kernels")
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for function in vars(module).values():
            if isinstance(function, triton.JITFunction):
                function.device_caches.clear()
    importlib.import_module(f"{package.__name__}.launch")._launchers.clear()
    importlib.import_module(f"{kernel.__name__}.form").forget()


def test_compiled_together_or_in_turn_the_results_are_the_same_bits(
    kernel, compilations, launchers, monkeypatch, tmp_path
):
    *arguments, grad_output = PROBLEM.draw("cuda", torch.bfloat16)
    leaves = [x.requires_grad_() for x in arguments if x.is_floating_point()]

    def step() -> list[torch.Tensor]:
        out = kernel.fused_experts(*arguments)
        known = len(compilations)
        results = [out.detach(), *torch.autograd.grad(out, leaves, grad_output)]
        assert together != (len(compilations) > known), "backward's kernels are compiled in forward, if together"
        return results

    together = True
    first, kernels = step(), sorted(name for name, _ in compilations)
    assert threading.main_thread() not in {thread for _, thread in compilations}
    assert len(kernels) > 6
    assert launchers and all(thread.name.startswith("ThreadPoolExecutor") for thread in launchers)

    together = False
    compilations.clear()
    _forget(kernel)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "in turn"))
    monkeypatch.delattr(triton, "AsyncCompileMode")
    again = step()
    assert sorted(name for name, _ in compilations) == kernels
    assert all(map(torch.equal, first, again))
