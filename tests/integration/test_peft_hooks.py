"""What is relied on inside PEFT. One of these failing means that PEFT has changed underneath."""

import inspect

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraModel
from peft.tuners.lora import layer as peft_layer
from peft.tuners.lora import model as peft_model
from torch import nn

from qwen3_moe_integration import kernelize_model, lora, peft_hooks
from tests.integration.lora import StackSized, config
from tests.integration.models import QWEN3, ExpertsCalls, tokens
from tests.kernel.oracle import assert_close


def test_peft_asks_our_dispatcher_and_writes_our_config():
    assert peft_model.dispatch_default is peft_hooks.dispatch
    assert "dispatch_default" in LoraModel._create_new_module.__code__.co_names
    assert LoraConfig.to_dict is peft_hooks.to_dict
    assert "self.to_dict()" in inspect.getsource(LoraConfig.save_pretrained)


def test_experts_get_our_wrappers_and_nothing_else_does():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = nn.Parameter(torch.randn(3, 4, 5))

    experts = get_peft_model(QWEN3.build(), config()).base_model.model.model.layers[0].mlp.experts
    assert type(experts) is type(experts.base_layer) is lora.ParamWrapper
    assert (experts.parameter_name, experts.base_layer.parameter_name) == ("down_proj", "gate_up_proj")
    other = get_peft_model(
        nn.Sequential(Other(), nn.Linear(2, 2)), LoraConfig(target_modules=[], target_parameters=["0.stack"])
    )
    assert type(other.base_model.model[0]) is peft_layer.ParamWrapper


def test_our_wrapper_has_the_name_by_which_peft_finds_its_own():
    assert issubclass(lora.ParamWrapper, peft_layer.ParamWrapper)
    assert lora.ParamWrapper.__name__ == peft_layer.ParamWrapper.__name__
    model = get_peft_model(QWEN3.build(), config())
    model.add_adapter("second", config())
    experts = model.base_model.model.model.layers[0].mlp.experts
    assert list(experts.lora_A) == list(experts.base_layer.lora_A) == ["default", "second"]
    assert type(experts.base_layer.base_layer).__name__ == "Qwen3MoeExperts"


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("__init__", ["base_layer", "adapter_name", "parameter_name", "config"]),
        ("update_layer", ["adapter_name", "r", "lora_alpha", "config"]),
        ("_get_in_out_features", ["module"]),
        ("_move_adapter_to_device_of_base_layer", ["adapter_name"]),
        ("set_adapter", ["adapter_names", "inference_mode"]),
        ("merge", ["safe_merge", "adapter_names"]),
        ("unmerge", []),
        ("_check_forward_args", ["x"]),
        ("forward", ["x"]),
    ],
)
def test_methods_that_are_called_or_replaced_take_what_they_took(method, parameters):
    taken = inspect.signature(getattr(peft_layer.ParamWrapper, method)).parameters
    assert list(taken)[1 : 1 + len(parameters)] == parameters


def test_a_wrapper_keeps_what_is_read_of_it():
    wrapper = get_peft_model(QWEN3.build(), config(r=3)).base_model.model.model.layers[0].mlp.experts
    assert wrapper.num_experts == 8 and wrapper.r == {"default": 3} and wrapper.scaling == {"default": 8 / 3}
    assert wrapper.lora_A["default"].weight.shape == (8 * 3, 24)
    assert wrapper.lora_B["default"].weight.shape == (32, 3 * 8)
    assert wrapper.active_adapters == ["default"] and not wrapper.disable_adapters and not wrapper.merged
    A, B = wrapper.factors("default")
    left, right, scaling = peft_layer.ParamWrapper.get_delta_factors(wrapper, "default")
    assert torch.equal(A, right) and torch.equal(B, left) and scaling == 8 / 3


def test_peft_still_refuses_what_this_package_makes_possible():
    experts = QWEN3.build().model.layers[0].mlp.experts
    with pytest.raises(ValueError, match="does not work with lora_dropout"):
        peft_layer.ParamWrapper(experts, "default", "down_proj", config(lora_dropout=0.1), r=2)


def test_wrappers_that_peft_made_by_itself_run_on_the_kernel(source, monkeypatch):
    """As when this package is imported after ``get_peft_model``."""
    with monkeypatch.context() as patch:
        patch.setattr(peft_model, "dispatch_default", peft_layer.dispatch_default)
        model = get_peft_model(QWEN3.build(), config())
        experts = model.base_model.model.model.layers[0].mlp.experts
        assert type(experts) is peft_layer.ParamWrapper
    input_ids = tokens()
    want = model(input_ids).logits
    kernelize_model(model, kernel=source)
    with ExpertsCalls() as calls, StackSized(model) as stacks:
        got = model(input_ids).logits
    assert (calls.forward, stacks.made) == (2, 0)
    assert_close("logits", want, got, 1e-5)
