"""The state of a layer changes with everything on which its launches depend, and with nothing else."""

import copy
import weakref
from collections import OrderedDict

import pytest
import torch
from torch import nn

from qwen3_moe_integration.layer_state import LayerState, NotRecordableError
from tests.integration.graphs import layers
from tests.integration.lora import config, pair


@pytest.fixture(scope="module")
def first(source) -> nn.Module:
    """A decoder layer with two adapters, the first of which is active."""
    return layers(pair(source, config(), config(r=2))[0])[0]


@pytest.fixture
def layer(first) -> nn.Module:
    layer = copy.deepcopy(first)
    layer.mlp.gate.register_buffer("calls", torch.zeros(3))
    layer.self_attn.v_proj.set_adapter(["first"])  # as a list, which could be changed in place
    return layer


def move(tensor: torch.Tensor) -> None:
    tensor.data = tensor.data.clone()


def replace(module: nn.Module, name: str) -> None:
    setattr(module, name, copy.deepcopy(getattr(module, name)))


class Scaled(nn.RMSNorm):
    pass


CHANGES = {
    "parameter moved": lambda layer: move(layer.self_attn.q_proj.base_layer.weight),
    "parameter replaced": lambda layer: replace(layer.self_attn.q_proj.base_layer, "weight"),
    "parameter frozen": lambda layer: layer.self_attn.q_proj.lora_A["first"].requires_grad_(False),
    "parameter in another dtype": lambda layer: layer.self_attn.q_norm.bfloat16(),
    "parameter taken away": lambda layer: layer.mlp.gate.register_parameter("weight", None),
    "buffer moved": lambda layer: move(layer.mlp.gate.calls),
    "buffer added": lambda layer: layer.mlp.gate.register_buffer("more", torch.zeros(2)),
    "evaluated": lambda layer: layer.mlp.gate.eval(),
    "module replaced": lambda layer: replace(layer.self_attn, "q_norm"),
    "module without parameters replaced": lambda layer: layer.self_attn.v_proj.lora_dropout.update(
        {"first": nn.Dropout()}
    ),
    "module within a new one": lambda layer: setattr(layer, "mlp", nn.Sequential(layer.mlp)),
    "module added": lambda layer: layer.self_attn.add_module("more", nn.Linear(2, 2)),
    "modules in a new dict": lambda layer: setattr(layer.mlp, "_modules", OrderedDict(gate=nn.Linear(2, 2))),
    "class changed": lambda layer: setattr(layer.self_attn.q_norm, "__class__", Scaled),
    "adapters off": lambda layer: setattr(layer.mlp.experts, "_disable_adapters", True),
    "adapter rescaled": lambda layer: layer.self_attn.v_proj.scaling.update(first=3.0),
    "adapter merged": lambda layer: layer.self_attn.v_proj.merged_adapters.append("first"),
    "adapter switched": lambda layer: setattr(layer.self_attn.v_proj, "_active_adapter", ["second"]),
    "adapter added to the active": lambda layer: layer.self_attn.v_proj.active_adapters.append("second"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_noticed(layer, change):
    state = LayerState(layer)
    before = state.read()
    assert state.read() == before
    change(layer)
    after = state.read()
    assert after != before and state.read() == after
    assert LayerState(layer).read() == after, "as if the layer had always been so"


HOOKS = {
    "forward": "_forward_hooks",
    "forward_pre": "_forward_pre_hooks",
    "full_backward": "_backward_hooks",
    "full_backward_pre": "_backward_pre_hooks",
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("renewed", [False, True])
def test_hooks_are_noticed_and_forgotten(layer, kind, renewed):
    state = LayerState(layer)
    before = state.read()
    if renewed:
        for name in HOOKS.values():
            setattr(layer.mlp.gate, name, OrderedDict())
    handle = getattr(layer.mlp.gate, f"register_{kind}_hook")(lambda *_: None)
    with pytest.raises(NotRecordableError, match="its Qwen3MoeTopKRouter has hooks"):
        state.read()
    handle.remove()
    assert state.read() == before


def test_hooks_of_a_module_that_has_come_are_noticed(layer):
    state = LayerState(layer)
    state.read()
    layer.self_attn.q_norm = nn.RMSNorm(8)
    layer.self_attn.q_norm.register_forward_hook(lambda *_: None)
    with pytest.raises(NotRecordableError, match="its RMSNorm has hooks"):
        state.read()


def test_accelerate_s_hooks_are_noticed(layer):
    state = LayerState(layer)
    state.read()
    layer._hf_hook = object()
    with pytest.raises(NotRecordableError, match="its Qwen3MoeDecoderLayer has hooks"):
        state.read()


def test_what_is_computed_with_changes_nothing(layer):
    state = LayerState(layer)
    before = state.read()
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
        parameter.data.mul_(2)
    layer.mlp.gate.calls.add_(1)
    assert state.read() == before


def test_whether_anything_is_trained(layer):
    state = LayerState(layer)
    assert state.read().is_trained
    layer.requires_grad_(False)
    assert not state.read().is_trained


def test_a_scripted_module_is_read(layer):
    layer.mlp = torch.jit.script(nn.Linear(2, 2))
    state = LayerState(layer)
    assert state.read() == state.read()
    before = state.read()
    layer.mlp.eval()
    assert state.read() != before


def test_the_layer_is_not_kept_alive():
    layer = nn.Sequential(nn.Linear(2, 2))
    state, alive = LayerState(layer), weakref.ref(layer)
    state.read()
    del layer
    assert alive() is None
