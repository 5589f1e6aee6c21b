"""The kernel layers, put in the place of a module's own forward."""

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import nn

from . import oracle
from .adapted import Adapter, Quantization, decoded
from .modules import Block, Experts, Router, with_forward
from .oracle import RATIO, assert_close
from .problems import Problem

PROBLEM = Problem(T=12)
LAYERS = ("Qwen3MoeExperts", "Qwen3MoeSparseMoeBlock")


@pytest.fixture
def block(kernel, device) -> Block:
    experts = Experts(PROBLEM.draw(device, torch.float32))
    gate = Router(PROBLEM.H, PROBLEM.E, PROBLEM.k).to(device)
    return with_forward(Block(gate, experts), kernel.layers.Qwen3MoeSparseMoeBlock)


@pytest.fixture
def hidden_states(device) -> torch.Tensor:
    return torch.randn(3, 4, PROBLEM.H, device=device, requires_grad=True)


def _expected(block: Block, hidden_states: torch.Tensor) -> torch.Tensor:
    tokens = hidden_states.detach().reshape(-1, PROBLEM.H)
    _, weights, index = Router.forward(block.gate, tokens)
    wide = (x.double() for x in (tokens, weights, block.experts.gate_up_proj, block.experts.down_proj))
    tokens, weights, gate_up, down = wide
    return oracle.experts(tokens, index, weights, gate_up, down).view(hidden_states.shape)


@pytest.mark.kernels_ci
def test_the_block_is_its_router_then_its_experts(block, hidden_states):
    assert_close("block", _expected(block, hidden_states), block(hidden_states), RATIO[torch.float32])


def test_a_batch_that_is_not_contiguous_gives_the_same(block, hidden_states):
    crossed = hidden_states.detach().transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(block(crossed), block(hidden_states))


def test_gradients_reach_the_tokens_the_router_and_the_experts(block, hidden_states):
    block(hidden_states).sum().backward()
    for tensor in (hidden_states, block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj):
        assert tensor.grad is not None and tensor.grad.any() and tensor.grad.isfinite().all()


def test_frozen_experts_get_no_gradient(block, hidden_states):
    block.experts.requires_grad_(False)
    block(hidden_states).sum().backward()
    assert hidden_states.grad is not None and block.gate.weight.grad is not None
    assert block.experts.gate_up_proj.grad is None and block.experts.down_proj.grad is None


def test_hooks_on_the_router_see_its_logits_once(block, hidden_states):
    seen = []
    block.gate.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    block(hidden_states)
    assert len(seen) == 1 and seen[0].shape == (12, PROBLEM.E)


def _instead_of_forward(experts: nn.Module, note: Callable) -> None:
    """As Accelerate's offloading and tensor parallelism do."""
    own = experts.forward
    experts.forward = lambda *args: note() or own(*args)


IN_BETWEEN = {
    "forward_pre_hook": lambda experts, note: experts.register_forward_pre_hook(lambda *_: note()),
    "forward_hook": lambda experts, note: experts.register_forward_hook(lambda *_: note()),
    "backward_pre_hook": lambda experts, note: experts.register_full_backward_pre_hook(lambda *_: note()),
    "backward_hook": lambda experts, note: experts.register_full_backward_hook(lambda *_: note()),
    "instead_of_forward": _instead_of_forward,
}


@pytest.mark.parametrize("put", IN_BETWEEN.values(), ids=IN_BETWEEN)
def test_what_stands_before_the_experts_is_called_once(kernel, block, hidden_states, put):
    expected, calls = block(hidden_states), []
    with_forward(block.experts, kernel.layers.Qwen3MoeExperts)
    put(block.experts, lambda: calls.append(1))
    out = block(hidden_states)
    assert torch.equal(out, expected)
    out.sum().backward()
    assert len(calls) == 1


def test_wrapped_experts_are_called_as_a_module(block, hidden_states):
    class Wrapper(nn.Module):
        def __init__(self, base_layer: nn.Module) -> None:
            super().__init__()
            self.base_layer = base_layer

        def forward(self, tokens, top_k_index, top_k_weights):
            return tokens + 1

    block.experts = Wrapper(block.experts)
    assert torch.equal(block(hidden_states), hidden_states + 1)


def test_the_experts_layer_alone_is_fused_experts(kernel, device):
    inputs = PROBLEM.draw(device, torch.float32)
    experts = with_forward(Experts(inputs), kernel.layers.Qwen3MoeExperts)
    out = experts(inputs.hidden_states, inputs.top_k_index, inputs.top_k_weights)
    assert torch.equal(out, kernel.fused_experts(*inputs[:-1]))


@pytest.mark.parametrize("adapted", [("gate_up", "down"), ("gate_up",), ("down",)], ids="+".join)
def test_adapters_left_on_the_experts_for_a_call_are_added(kernel, device, adapted):
    inputs = PROBLEM.draw(device, torch.float32)
    factors = Adapter().draw(PROBLEM, device, torch.float32)
    lora = {name: (factors[f"{name}_A"], factors[f"{name}_B"], 0.5, 0.0) for name in adapted}
    experts = with_forward(Experts(inputs), kernel.layers.Qwen3MoeExperts)
    experts.lora = {f"{name}_proj": fields for name, fields in lora.items()}
    out = experts(inputs.hidden_states, inputs.top_k_index, inputs.top_k_weights)
    given = {f"{name}_lora": kernel.Lora(*fields) for name, fields in lora.items()}
    assert torch.equal(out, kernel.fused_experts(*inputs[:-1], **given))
    assert not torch.equal(out, kernel.fused_experts(*inputs[:-1]))


def _new_data(experts, inputs):
    experts.gate_up_proj.data = inputs.gate_up_proj
    experts.down_proj.data = inputs.down_proj


def _new_parameters(experts, inputs):
    experts.gate_up_proj, experts.down_proj = nn.Parameter(inputs.gate_up_proj), nn.Parameter(inputs.down_proj)


def _written_in_place(experts, inputs):
    with torch.no_grad():
        experts.gate_up_proj.copy_(inputs.gate_up_proj)
        experts.down_proj.copy_(inputs.down_proj)


def _crossed_in_memory(experts, inputs):
    experts.gate_up_proj.data = inputs.gate_up_proj.transpose(1, 2).contiguous().transpose(1, 2)


def _misaligned(experts, inputs):
    data = torch.cat((inputs.down_proj.new_zeros(1), inputs.down_proj.flatten()))
    experts.down_proj.data = data[1:].view(inputs.down_proj.shape)


CHANGES = [_new_data, _new_parameters, _written_in_place, _crossed_in_memory, _misaligned]
CHANGES += [lambda experts, _: experts.half(), lambda experts, _: experts.gate_up_proj.requires_grad_(False)]


@pytest.mark.parametrize("order", [CHANGES, CHANGES[::-1]], ids=["forwards", "backwards"])
def test_each_call_takes_the_weights_as_they_are_then(kernel, device, order):
    """Whatever is kept between calls to save the host time must not outlive a change of what it was made of."""
    experts = with_forward(Experts(PROBLEM.draw(device, torch.float32)), kernel.layers.Qwen3MoeExperts)
    for change in (lambda *_: None, *order, lambda experts, _: experts.float()):
        change(experts, PROBLEM.draw(device, experts.gate_up_proj.dtype))
        hidden, index, weights, _, _, grad_output = PROBLEM.draw(device, experts.gate_up_proj.dtype)
        leaves = [hidden.requires_grad_(), experts.gate_up_proj, experts.down_proj]
        wide = [x.detach().double().requires_grad_(x.requires_grad) for x in leaves]
        out, ref = experts(hidden, index, weights), oracle.experts(wide[0], index, weights.double(), *wide[1:])
        grads = torch.autograd.grad(out, [x for x in leaves if x.requires_grad], grad_output)
        ref_grads = torch.autograd.grad(ref, [x for x in wide if x.requires_grad], grad_output.double())
        for want, got in zip((ref, *ref_grads), (out, *grads)):
            assert_close("after a change", want, got, RATIO[got.dtype])


def test_each_call_takes_the_4_bit_weights_and_adapters_as_they_are_then(kernel, device):
    inputs = PROBLEM.draw(device, torch.float32)
    experts = with_forward(Experts(inputs), kernel.layers.Qwen3MoeExperts)
    factors = Adapter().draw(PROBLEM, device, torch.float32)
    lora = {"down_proj": (factors["down_A"], factors["down_B"], 0.5, 0.0)}
    for quantization in (Quantization(), Quantization("fp4", blocksize=128), Quantization(nested=False)):
        for name in ("gate_up_proj", "down_proj"):
            fresh = getattr(PROBLEM.draw(device, torch.float32), name)
            setattr(experts, name, quantization.quantize(fresh))
        for experts.lora in ({}, lora, {}):
            out = experts(inputs.hidden_states, inputs.top_k_index, inputs.top_k_weights)
            dense = [decoded(x, torch.float32) for x in (experts.gate_up_proj, experts.down_proj)]
            given = kernel.Lora(*lora["down_proj"]) if experts.lora else None
            ref = kernel.fused_experts(*inputs[:3], *dense, down_lora=given)
            assert_close("after a change", ref.double(), out, RATIO[torch.float32])


def test_unsupported_experts_are_refused_by_name(kernel, block, hidden_states):
    block.experts.act_fn = nn.ReLU()
    with pytest.raises(ValueError, match="Experts cannot run as fused_experts: its activation is ReLU"):
        block(hidden_states)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_adds_a_forward_and_two_flags_and_keeps_nothing(kernel, name):
    layer = getattr(kernel.layers, name)
    own = {member for member in vars(layer) if not member.startswith("__")}
    assert own == {"forward", "can_torch_compile", "has_backward"}
    assert layer.can_torch_compile is True and layer.has_backward is True
    assert "__init__" not in vars(layer)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Qwen3MoeExperts", ["self", "hidden_states", "top_k_index", "top_k_weights"]),
        ("Qwen3MoeSparseMoeBlock", ["self", "hidden_states"]),
    ],
)
def test_a_layer_takes_what_the_layer_it_replaces_takes(kernel, name, parameters):
    assert list(inspect.signature(getattr(kernel.layers, name).forward).parameters) == parameters


def test_a_call_leaves_the_state_dict_as_it_was(block, hidden_states):
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    block(hidden_states).sum().backward()
    after = block.state_dict()
    assert list(before) == list(after) == ["gate.weight", "experts.gate_up_proj", "experts.down_proj"]
    assert all(torch.equal(before[name], after[name]) for name in before)
