"""PEFT and the kernel, in either order: adapters train exactly as they do on stock experts."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from qwen3_moe_integration import kernelize_model
from tests.integration.models import QWEN3, ExpertsCalls, assert_same_training, generated, stock_twin

ATTENTION = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], init_lora_weights=False)
EXPERTS = LoraConfig(
    r=4,
    target_modules=[],
    target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    init_lora_weights=False,
)
CONFIGS = pytest.mark.parametrize("config", [ATTENTION, EXPERTS], ids=["attention", "experts"])
"""``init_lora_weights=False`` makes every factor random, so that the adapters change the result."""


@pytest.mark.compat
@CONFIGS
@pytest.mark.parametrize("kernelized", ["before", "after"])
def test_adapters_train_as_on_stock_experts(source, config, kernelized):
    model = QWEN3.build()
    if kernelized == "before":
        kernelize_model(model, kernel=source)
    model = get_peft_model(model, config)
    stock = get_peft_model(stock_twin(QWEN3.build()), config)
    if kernelized == "after":
        kernelize_model(model, kernel=source)
    stock.load_state_dict(model.state_dict())
    with ExpertsCalls() as calls:
        assert_same_training(model.train(), stock.train())
    assert (calls.forward, calls.backward) == (2, 2)
    assert torch.equal(generated(model), generated(stock))
    with model.disable_adapter(), stock.disable_adapter():
        assert torch.equal(generated(model), generated(stock))


@CONFIGS
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_adapters_train_under_gradient_checkpointing(source, config, use_reentrant):
    model = get_peft_model(kernelize_model(QWEN3.build(), kernel=source), config).train()
    plain = copy.deepcopy(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_same_training(model, plain)


def test_merged_adapters_give_what_stock_gives(source):
    model = kernelize_model(get_peft_model(QWEN3.build(), EXPERTS), kernel=source)
    stock = get_peft_model(stock_twin(QWEN3.build()), EXPERTS)
    stock.load_state_dict(model.state_dict())
    merged, stock_merged = model.merge_and_unload(), stock.merge_and_unload()
    with ExpertsCalls() as calls:
        assert torch.equal(generated(merged), generated(stock_merged))
    assert calls.forward == 2 * 12
