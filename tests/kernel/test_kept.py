"""Layers computed twice: what the first call keeps serves the second, with the same gradients to the last bit."""

import importlib
import threading
from types import ModuleType
from typing import Optional

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .adapted import Adapter
from .oracle import RATIO, assert_close
from .poison import poisoned_memory
from .problems import Problem

Tensor = torch.Tensor
KINDS = ["plain", "adapted", "adapted with dropout"]


class Call:
    """Of a layer in fp32, all of it trained, its numbers drawn anew."""

    def __init__(self, kernel: ModuleType, device: str, kind: str = "adapted", problem: Optional[Problem] = None):
        problem = problem or Problem(imbalance="some_skipped")
        *inputs, self.grad = problem.draw(device, torch.float32)
        self.inputs = [x.requires_grad_() if x.is_floating_point() else x for x in inputs]
        self.leaves, self.loras = [x for x in self.inputs if x.requires_grad], ()
        if kind != "plain":
            factors = [x.requires_grad_() for x in Adapter().draw(problem, device, torch.float32).values()]
            self.leaves += factors
            dropout = 0.4 if "dropout" in kind else 0.0
            self.loras = [kernel.Lora(*factors[i : i + 2], 0.5, dropout) for i in (0, 2)]
        self.kernel = kernel

    def result(self) -> Tensor:
        return self.kernel.fused_experts(*self.inputs, "silu", *self.loras)

    def gradients(self, result: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(result, self.leaves, self.grad)


@pytest.fixture
def forwards(kernel, monkeypatch) -> list[tuple]:
    """The inputs of each forward that a backend has computed."""
    table, computed = importlib.import_module(f"{kernel.__name__}.backends").FORWARD, []
    for kind, forward in table.items():
        monkeypatch.setitem(table, kind, lambda *inputs, forward=forward: computed.append(inputs) or forward(*inputs))
    return computed


def seeded(call: Call, seed: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    torch.manual_seed(seed)
    result = call.result()
    return result.detach(), call.gradients(result)


@pytest.mark.parametrize("kind", KINDS)
def test_the_second_time_nothing_is_computed_and_the_gradients_are_the_same(kernel, device, forwards, kind):
    call = Call(kernel, device, kind)
    want, wanted = seeded(call, 1)
    torch.manual_seed(1)
    with torch.no_grad(), kernel.keeping() as kept:
        assert torch.equal(call.result(), want)
    forwards.clear()
    with poisoned_memory(device), kernel.for_gradients(kept):
        result = call.result()  # another seed is drawn for dropout, and not used
    assert result.isnan().all() and result.shape == want.shape and not forwards
    assert all(map(torch.equal, call.gradients(result), wanted))
    assert torch.equal(seeded(call, 1)[0], want) and forwards, "outside, all is as ever"


def test_what_is_kept_is_what_autograd_would_save(kernel, device):
    call, saved = Call(kernel, device, "adapted with dropout"), []
    with torch.no_grad(), kernel.keeping() as kept:
        call.result()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        call.result()
    own = {x.data_ptr() for x in (*call.inputs, *call.leaves)}
    assert [x.shape for x in kept[0]] == [x.shape for x in saved if x.data_ptr() not in own]


def test_with_gradients_too_it_is_kept(kernel, device, forwards):
    call = Call(kernel, device)
    with kernel.keeping() as kept:
        wanted = call.gradients(call.result())
    with kernel.for_gradients(kept):
        assert all(map(torch.equal, call.gradients(call.result()), wanted))
    assert len(forwards) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_kept_again_it_lies_where_it_lay(kernel, device, kind, forwards):
    call, other = Call(kernel, device, kind), Call(kernel, device, kind)
    torch.manual_seed(1)
    with torch.no_grad(), kernel.keeping() as kept:
        call.result()
    places = [x if x is None else x.data_ptr() for x in kept[0]]
    want, wanted = seeded(other, 2)
    torch.manual_seed(2)
    with torch.no_grad(), poisoned_memory(device), kernel.keeping(kept) as same:
        assert torch.equal(other.result(), want)
    assert same is kept and [x if x is None else x.data_ptr() for x in kept[0]] == places
    assert forwards[-1][-1] is kept[0][1], "the largest is computed where it is kept"
    with kernel.for_gradients(kept):
        assert all(map(torch.equal, other.gradients(other.result()), wanted))


def test_calls_are_told_apart_by_their_order(kernel, device, forwards):
    calls = [Call(kernel, device, problem=Problem(T=tokens)) for tokens in (5, 9, 5)]
    wanted = [seeded(call, 1)[1] for call in calls]
    with torch.no_grad(), kernel.keeping() as kept:
        for call in calls[:2]:
            call.result()
    forwards.clear()
    with kernel.for_gradients(kept):
        results = [call.result() for call in calls]
    assert len(forwards) == 1, "of the one that was not kept"
    for call, result, want in zip(calls, results, wanted):
        assert all(map(torch.equal, call.gradients(result), want))


OTHERS = {
    "9 for 5 tokens": ("adapted", Problem(T=9), "18 slots of 32 columns in torch.float32"),
    "another width": ("adapted", Problem(T=5, I=24), "10 slots of 48 columns in torch.float32"),
    "no adapters": ("plain", Problem(T=5), "adapters of 0 and 0 ranks, no dropout"),
    "dropout": ("adapted with dropout", Problem(T=5), "adapters of 4 and 4 ranks, dropout"),
}


@pytest.mark.parametrize("again", ["keeping", "for_gradients"])
@pytest.mark.parametrize(("kind", "problem", "what"), OTHERS.values(), ids=OTHERS)
def test_another_call_than_the_first_is_refused(kernel, device, forwards, again, kind, problem, what):
    """On a GPU, kernels would write beyond what is kept."""
    call = Call(kernel, device, problem=Problem(T=5))
    with torch.no_grad(), kernel.keeping() as kept:
        call.result()
    forwards.clear()
    got = "got 10 slots of 32 columns in torch.float32, adapters of 4 and 4 ranks, no dropout for"
    with pytest.raises(ValueError, match=f"kept must be of .*, {got} .*{what}"), getattr(kernel, again)(kept):
        Call(kernel, device, kind, problem).result()
    with (
        pytest.raises(ValueError, match=f"{got} 10 slots of 32 columns in torch.bfloat16"),
        getattr(kernel, again)(kept),
        torch.autocast(device, torch.bfloat16),
    ):
        call.result()
    assert not forwards, "before anything is computed"


def test_the_innermost_counts_in_one_thread_and_until_it_ends(kernel, device, forwards):
    call, elsewhere = Call(kernel, device), []
    want, wanted = seeded(call, 1)
    with pytest.raises(KeyError), kernel.keeping() as outer:
        call.result()
        with kernel.keeping() as inner, kernel.for_gradients():
            assert call.result().isnan().all()
        thread = threading.Thread(target=lambda: elsewhere.append(call.result().detach()))
        thread.start()
        thread.join()
        call.result()
        raise KeyError
    assert (len(outer), len(inner)) == (2, 0) and torch.equal(*elsewhere, want)
    forwards.clear()
    with kernel.for_gradients(outer):
        assert all(map(torch.equal, call.gradients(call.result()), wanted)) and not forwards
        with pytest.raises(KeyError), kernel.for_gradients():
            raise KeyError
        call.result()
        assert not forwards
    assert torch.equal(call.result(), want) and forwards


def test_what_has_been_overwritten_has_no_gradients(kernel, device):
    call, other = Call(kernel, device), Call(kernel, device)
    with torch.no_grad(), kernel.keeping() as kept:
        call.result()
    with kernel.for_gradients(kept):
        result = call.result()
    with torch.no_grad(), kernel.keeping(kept):
        other.result()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        call.gradients(result)


class Watched(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_calls_that_a_dispatch_mode_sees_are_computed_both_times(kernel, device):
    call = Call(kernel, device)
    _, wanted = seeded(call, 1)
    with torch.no_grad(), Watched(), kernel.keeping() as kept:
        call.result()
    assert kept == []
    with torch.no_grad(), kernel.keeping(kept):
        call.result()
    with Watched(), kernel.for_gradients(kept):
        result = call.result()
    assert not result.isnan().any() and all(map(torch.equal, call.gradients(result), wanted))


def test_a_call_without_gradients_has_its_result_the_second_time_too(kernel, device):
    call = Call(kernel, device)
    with torch.no_grad(), kernel.keeping() as kept:
        want = call.result()
    with torch.no_grad(), kernel.for_gradients(kept):
        assert_close("result", want, call.result(), RATIO[torch.float32])
