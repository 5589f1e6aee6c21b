"""The layer is a torch op to whoever looks for one; where nobody does, the same code runs without the dispatcher."""

import importlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from .adapted import Quantization
from .modes import Seen
from .oracle import RATIO, assert_close
from .problems import Problem


def _leaves(inputs) -> list[torch.Tensor]:
    return [x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs[:-1]]


def _results(kernel, inputs) -> list[torch.Tensor]:
    leaves = _leaves(inputs)
    out = kernel.fused_experts(*leaves)
    return [out, *torch.autograd.grad(out, [x for x in leaves if x.requires_grad], inputs.grad_output)]


def test_a_dispatch_mode_sees_both_ops_and_the_same_numbers(kernel, device):
    inputs = Problem(imbalance="some_skipped").draw(device, torch.float32)
    with Seen() as seen:
        watched = _results(kernel, inputs)
    assert seen.ops == ["fused_experts", "fused_experts_backward"]
    assert all(map(torch.equal, watched, _results(kernel, inputs)))


def test_without_one_the_dispatcher_is_left_out(kernel, device):
    out = kernel.fused_experts(*_leaves(Problem().draw(device, torch.float32)))
    assert type(out.grad_fn).__name__ == "FusedExpertsBackward"
    with Seen():
        out = kernel.fused_experts(*_leaves(Problem().draw(device, torch.float32)))
    assert type(out.grad_fn).__name__ != "FusedExpertsBackward"


def test_only_the_gradients_asked_for_come_back(kernel, device):
    inputs = Problem().draw(device, torch.float32)
    hidden, index, weights, gate_up, down = (x.detach() for x in inputs[:-1])
    weights.requires_grad_()
    kernel.fused_experts(hidden, index, weights, gate_up, down).backward(inputs.grad_output)
    assert weights.grad is not None and hidden.grad is gate_up.grad is down.grad is None


def test_a_checkpointed_layer_has_the_same_gradients(kernel, device):
    inputs = Problem().draw(device, torch.float32)
    leaves = _leaves(inputs)
    out = checkpoint(kernel.fused_experts, *leaves, use_reentrant=False)
    grads = torch.autograd.grad(out, [x for x in leaves if x.requires_grad], inputs.grad_output)
    assert all(map(torch.equal, [out, *grads], _results(kernel, inputs)))


@pytest.fixture
def calls(kernel, monkeypatch) -> list:
    """One entry for each time that ``fused_experts`` has gone by the op."""
    experts = importlib.import_module(f"{kernel.__name__}.experts")
    seen, op = [], experts.forward_op
    monkeypatch.setattr(experts, "forward_op", lambda *arguments: seen.append(1) or op(*arguments))
    return seen


def test_torch_func_maps_over_the_op(kernel, calls):
    """vmap has no rule for the op and runs it once for each entry, with a warning."""
    hidden, *rest, _ = Problem().draw("cpu", torch.float32)
    several = torch.stack((hidden, -hidden, 2 * hidden))
    out = torch.vmap(lambda x: kernel.fused_experts(x, *rest))(several)
    assert len(calls) == 1
    for x, y in zip(several, out):
        assert_close("mapped", kernel.fused_experts(x, *rest), y, RATIO[torch.float32])


def test_tensors_of_another_kind_meet_the_op(kernel, calls):
    """Fake ones here, outside their mode; nothing else tells that there is no data behind them."""
    inputs, mode = Problem().draw("cpu", torch.float32), FakeTensorMode()
    kernel.fused_experts(*inputs[:-1])
    assert not calls
    out = kernel.fused_experts(mode.from_tensor(inputs.hidden_states), *map(mode.from_tensor, inputs[1:-1]))
    assert len(calls) == 1 and out.shape == inputs.hidden_states.shape


def test_dequantize_is_an_op_only_to_whoever_looks(kernel, device, monkeypatch):
    four_bit = importlib.import_module(f"{kernel.__name__}.four_bit")
    weight = kernel.four_bit_weight(Quantization().quantize(torch.randn(2, 64, 64, device=device)))
    with Seen() as seen:
        watched = kernel.dequantize(weight)
    assert seen.ops == ["dequantize"]
    mode = FakeTensorMode()
    fake = weight._replace(**{name: mode.from_tensor(getattr(weight, name)) for name in weight._fields[:6]})
    assert kernel.dequantize(fake).shape == weight.shape
    monkeypatch.setattr(four_bit, "_dequantize", None)
    assert torch.equal(watched, kernel.dequantize(weight))
