"""The first call: its kernels are compiled together in a rehearsal, and nothing is launched twice or left out.

Triton's compiler is stood in for, and launches are only noted: what is tested is when each kernel is compiled, by which
thread, and that the calls go on to launch what they would have launched anyway.
"""

import importlib
import threading
from contextlib import nullcontext

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import _async_compile

from .absent import LAYERS, Layer, module

pytestmark = pytest.mark.filterwarnings("error:Triton kernels are compiled one after the other")


@pytest.mark.parametrize("tokens", [24, 3000])
@pytest.mark.parametrize("kind", LAYERS)
def test_forward_compiles_all_of_a_training_step_at_once(kernel, compiler, kind, tokens):
    compiler.on_compile = lambda name: threads.add(threading.current_thread())
    threads = set()
    layer = Layer(kernel, kind, tokens)
    _, *saved = layer.forward()
    assert {"_gate_up_kernel", "_down_backward_kernel", "_combine_backward_kernel"} <= set(compiler.compiled)
    assert "_down_backward_kernel" not in compiler.launched
    known = len(compiler.compiled)
    layer.backward(tuple(saved))
    assert len(compiler.compiled) == known and not compiler.in_turn and threading.main_thread() not in threads


@pytest.mark.parametrize("save", [True, False])
def test_the_slowest_kernel_is_among_the_first_that_compile(kernel, compiler, save):
    Layer(kernel, "4 bit with adapters").forward(save)
    others = {"_gate_up_kernel", "_linear_kernel", "factor_grads_kernel", "_combine_kernel"}
    assert compiler.asked.index("_down_backward_kernel") < min(map(compiler.asked.index, others))


@pytest.mark.parametrize("kind", LAYERS)
def test_the_first_step_launches_what_every_step_launches(kernel, compiler, kind, monkeypatch):
    layer = Layer(kernel, kind)
    layer.step()
    first = list(compiler.launched)
    monkeypatch.setattr(module(kernel, "first_call"), "_rehearse", None)  # would fail if it were called
    layer.step()
    Layer(kernel, kind, tokens=23).step()
    assert compiler.launched == 3 * first and first


def test_the_layer_itself_compiles_all_in_forward(kernel, compiler, monkeypatch):
    backends = importlib.import_module(f"{kernel.__name__}.backends")
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setitem(backends.FORWARD, "cpu", backends.FORWARD["cuda"])
    monkeypatch.setitem(backends.BACKWARD, "cpu", backends.BACKWARD["cuda"])
    layer = Layer(kernel, "adapters")
    weights, adapters, _ = zip(*layer.projections)
    out = kernel.fused_experts(*layer.tokens, *weights, "silu", *adapters)
    known = len(compiler.compiled)
    out.backward(torch.empty_like(out))
    assert {"factor_grads_kernel", "_down_backward_kernel"} <= set(compiler.launched)
    assert len(compiler.compiled) == known and not compiler.in_turn


def test_inference_compiles_no_kernel_of_backward(kernel, compiler):
    Layer(kernel, "dense").forward(save=False)
    assert sorted(set(compiler.compiled)) == sorted(set(compiler.launched)) and compiler.launched


@pytest.mark.parametrize("kind", ["adapters", "4 bit with adapters", "4 bit with adapters, fast"])
def test_a_call_without_gradients_compiles_all_of_a_checkpointed_step(kernel, compiler, kind, monkeypatch):
    if "fast" in kind:  # whose scales are prepared for one projection if the result is not wanted, else for both
        regime = importlib.import_module(f"{kernel.__name__}.regime")
        monkeypatch.setattr(regime, "has_byte_permute", lambda device: True)
        monkeypatch.setattr(regime, "_fits_fast", lambda weight: True)
    layer = Layer(kernel, kind)
    with torch.no_grad():  # as PEFT's factors come: views of parameters
        for at, (weight, lora, _) in enumerate(layer.projections):
            views = (factor.view(factor.shape) for factor in lora[:2])
            layer.projections[at] = layer.projection.Projection(weight, lora.__class__(*views))
    layer.forward(save=False)
    known = len(compiler.compiled)
    assert {"_down_backward_kernel", "factor_grads_kernel"} <= set(compiler.compiled) - set(compiler.launched)
    layer.step()
    _, *saved = layer.forward(result=False)
    layer.backward(tuple(saved))
    assert len(compiler.compiled) == known and not compiler.in_turn


def test_inference_with_adapters_that_are_not_trained_compiles_no_kernel_of_backward(kernel, compiler):
    layer = Layer(kernel, "4 bit with adapters")
    for projection in layer.projections:
        for factor in projection.lora[:2]:
            factor.requires_grad_(False)
    layer.forward(save=False)
    assert sorted(set(compiler.compiled)) == sorted(set(compiler.launched)) and compiler.launched


@pytest.mark.parametrize("kind", LAYERS)
def test_whoever_compiles_a_kernel_builds_its_launcher(kernel, compiler, kind):
    Layer(kernel, kind).step()
    names, threads = zip(*compiler.launchers)
    assert sorted(names) == sorted(compiler.compiled) and threading.main_thread() not in threads


def test_a_launcher_that_cannot_be_built_is_left_to_the_launch(kernel, compiler):
    compiler.without_launcher = "_combine_kernel"
    layer = Layer(kernel, "dense")
    with pytest.warns(match="one after the other.*_combine_kernel has no launcher"):
        layer.forward()
    assert compiler.launched[-1] == "_combine_kernel"


def test_backward_with_other_gradients_compiles_the_rest_at_once(kernel, compiler):
    layer = Layer(kernel, "dense")
    _, *saved = layer.forward()
    layer.trained = True
    known = set(compiler.compiled)
    layer.backward(tuple(saved))
    assert compiler.launched.count("_weight_grad_kernel") == 2 and not compiler.in_turn
    assert "_weight_grad_kernel" in set(compiler.compiled) - known


def test_a_kernel_that_does_not_compile_fails_where_it_is_launched(kernel, compiler):
    compiler.broken = "_down_backward_kernel"
    layer = Layer(kernel, "dense")
    with pytest.warns(match="one after the other.*_down_backward_kernel does not compile"):
        _, *saved = layer.forward()
    assert compiler.launched[-1] == "_combine_kernel"
    with pytest.raises(RuntimeError, match="_down_backward_kernel does not compile"), pytest.warns():
        layer.backward(tuple(saved))
    compiler.broken = ""
    layer.backward(tuple(saved))
    assert compiler.launched[-1] == "_combine_backward_kernel"


def test_while_a_graph_is_captured_kernels_are_compiled_in_turn(kernel, compiler, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    Layer(kernel, "dense").forward()
    assert compiler.in_turn == compiler.compiled and set(compiler.launched) == set(compiler.compiled)


def test_a_triton_that_cannot_compile_at_once_compiles_in_turn(kernel, compiler, monkeypatch):
    monkeypatch.delattr(triton, "AsyncCompileMode")
    layer = Layer(kernel, "adapters")
    with pytest.warns(match="one after the other.*AsyncCompileMode"):
        layer.step()
    assert compiler.in_turn == compiler.compiled
    first = list(compiler.launched)
    layer.step()
    assert compiler.launched == 2 * first


def test_a_mode_the_caller_has_entered_is_left_alone(kernel, compiler):
    class Mode(triton.AsyncCompileMode):
        def submit(self, *args):
            raise AssertionError("compiled by the caller's executor")

    with Mode(None) as mode:
        Layer(kernel, "dense").step()
        assert _async_compile.active_mode.get() is mode
    assert not compiler.in_turn


def test_another_thread_launches_while_one_rehearses(kernel, compiler):
    """Both what it has and what it lacks, and neither is lost."""
    settled = Layer(kernel, "dense")
    settled.step()
    step = list(compiler.launched)
    compiling, go_on = threading.Event(), threading.Event()

    def wait(name: str) -> None:
        compiling.set()
        assert go_on.wait(30)

    compiler.on_compile = wait
    rehearsing = threading.Thread(target=Layer(kernel, "adapters").step)
    rehearsing.start()
    assert compiling.wait(30)
    compiler.launched.clear()
    settled.step()
    assert compiler.launched == step
    waiting = threading.Thread(target=Layer(kernel, "trained").step)
    waiting.start()
    go_on.set()
    for thread in (rehearsing, waiting):
        thread.join(30)
        assert not thread.is_alive()
    assert not compiler.in_turn and compiler.launched.count("_weight_grad_kernel") == 2
    assert compiler.launched.count("low_rank_kernel") == 4
    assert not module(kernel, "first_call").rehearsing


@triton.jit
def _fill(x, VALUE: tl.constexpr):
    tl.store(x + tl.arange(0, 16), VALUE)


def test_tritons_own_compiler_does_it_in_threads(kernel, absent_card, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    first_call, launch = module(kernel, "first_call"), module(kernel, "launch").launch
    x = torch.empty(16)

    def call() -> None:
        for value in (1.0, 2.0, 3.0, 2.0):
            launch(_fill, (1,), 1, 1, (x,), (), value)

    first_call._rehearse(call, ())
    compiled = _fill.device_caches[absent_card][0].values()
    assert [kernel.asm["ptx"].count("st.global") for kernel in compiled] == [1, 1, 1]
    assert len(list(tmp_path.rglob("*.cubin"))) == len(absent_card.launchers) == 3

    _fill.device_caches.clear()
    first_call._rehearse(call, ())
    assert len(list(tmp_path.rglob("*.cubin"))) == 3, "nothing is compiled again, for all is in Triton's cache"
    names, threads = zip(*absent_card.launchers)
    assert names == ("_fill",) * 6 and threading.main_thread() not in threads
