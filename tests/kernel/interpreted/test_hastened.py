"""The interpreter computes the same with less to do."""

import pytest
import torch
import triton
from triton.runtime import interpreter

from tests import interpreter as hastened
from tests.kernel.problems import Problem


@pytest.fixture
def slow():
    """The interpreter as Triton has it."""
    hastened.slow_down()
    yield
    hastened.hasten()


def _results(kernel) -> list[torch.Tensor]:
    inputs = Problem(T=9, H=48, I=40, seed=1).draw("cpu", torch.float16)
    leaves = [x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs[:-1]]
    out = kernel.fused_experts(*leaves)
    return [out.detach(), *torch.autograd.grad(out, [x for x in leaves if x.requires_grad], inputs.grad_output)]


def test_no_bit_differs(triton_kernel, slow):
    before = _results(triton_kernel)
    hastened.hasten()
    assert all(map(torch.equal, before, _results(triton_kernel)))


@pytest.mark.skipif(not triton.__version__.startswith(hastened.VERSION), reason="Triton is left alone")
def test_it_can_be_undone(slow):
    before = interpreter._patch_lang, interpreter._get_np_dtype, interpreter.interpreter_builder.options
    hastened.hasten()
    assert interpreter._patch_lang is not before[0]
    hastened.slow_down()
    assert (interpreter._patch_lang, interpreter._get_np_dtype, interpreter.interpreter_builder.options) == before


def test_another_version_is_left_alone(slow, monkeypatch):
    before = interpreter._patch_lang
    monkeypatch.setattr(hastened, "VERSION", "no such")
    hastened.hasten()
    assert interpreter._patch_lang is before
