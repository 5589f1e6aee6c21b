"""LoRA of experts on the kernel: trains, switches and merges exactly as PEFT's own, and never builds W + BA."""

import pytest
import torch
from peft import get_peft_model

from qwen3_moe_integration import expert_lora_config, kernelize_model
from tests.integration.lora import PARAMETERS, StackSized, config, pair, with_adapters
from tests.integration.models import (
    GPU_RATIO,
    QWEN3,
    RATIO,
    ExpertsCalls,
    Tiny,
    assert_same_training,
    generated,
    stock_twin,
    tokens,
)
from tests.integration.test_experts import ARIA, LOCAL, OURS
from tests.kernel.oracle import assert_close

CONFIGS = {
    "plain": config(),
    "rslora": config(use_rslora=True),
    "ranks and alphas": config(
        rank_pattern={"mlp.experts.down_proj": 1, r"0\.mlp\.experts\.gate_up_proj": 9},
        alpha_pattern={"mlp.experts.gate_up_proj": 3},
    ),
    "only gate_up": config(target_parameters=PARAMETERS[:1]),
    "only down": config(target_parameters=PARAMETERS[1:]),
    "only experts": expert_lora_config(3, 5, init_lora_weights=False),
    "experts of rank 2": expert_lora_config(2, None, ["q_proj"], 5, 3, init_lora_weights=False),
    "router and head trained": config(modules_to_save=["gate", "lm_head"]),
}


@pytest.mark.compat
@pytest.mark.parametrize("kernelized", ["before", "after"])
@pytest.mark.parametrize("name", CONFIGS)
def test_adapters_train_as_in_peft(source, device, name, kernelized):
    model, stock = pair(source, CONFIGS[name], kernelized=kernelized, device=device)
    with ExpertsCalls() as calls:
        assert_same_training(model, stock, ratio=RATIO if device == "cpu" else GPU_RATIO)
    assert (calls.forward, calls.backward) == (2, 2)


def test_ranks_and_scalings_are_those_of_the_config():
    ranks = {
        name: (module.r["default"], module.scaling["default"])
        for name, module in get_peft_model(QWEN3.build(), CONFIGS["ranks and alphas"]).named_modules()
        if name.endswith(("0.mlp.experts", "experts.base_layer")) and hasattr(module, "r")
    }
    layers = "base_model.model.model.layers"
    assert ranks == {
        f"{layers}.0.mlp.experts": (1, 8),
        f"{layers}.0.mlp.experts.base_layer": (9, 3 / 9),
        f"{layers}.1.mlp.experts.base_layer": (4, 3 / 4),
    }
    made = expert_lora_config(2, 6, ["q_proj", "v_proj"], module_rank=5, lora_dropout=0.1)
    assert (made.r, made.lora_alpha, made.lora_dropout) == (2, 6, 0.1)
    assert made.rank_pattern == made.alpha_pattern == {"q_proj": 5, "v_proj": 5}


def test_nothing_as_large_as_the_experts_is_made(source):
    models = pair(source, config())
    made = []
    for model in models:
        input_ids = tokens()
        with StackSized(model) as stacks:
            model(input_ids=input_ids, labels=input_ids).loss.backward()
        made.append(stacks.made)
    assert made[0] == 0 < made[1]


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_a_new_adapter_changes_nothing_until_it_is_trained(source, init):
    model = QWEN3.build()
    stock, input_ids = stock_twin(model), tokens()
    model = kernelize_model(get_peft_model(model, config(init_lora_weights=init)), kernel=source)
    assert_close("logits", stock(input_ids).logits, model(input_ids).logits, 1e-5)
    model(input_ids=input_ids, labels=input_ids).loss.backward()
    for name, parameter in model.named_parameters():
        if "experts" in name and "lora" in name:
            assert bool(parameter.any()) == ("lora_A" in name)
            assert bool(parameter.grad.any()) == ("lora_B" in name)


def test_adapters_are_added_switched_and_deleted_as_in_peft(source):
    models = pair(source, config(), config(r=2, lora_alpha=1, use_rslora=True))
    _assert_same_logits(*models)
    for model in models:
        model.set_adapter("second")
    assert_same_training(*models)
    with models[0].disable_adapter(), models[1].disable_adapter():
        _assert_same_logits(*models)
    for model in models:
        model.delete_adapter("second")
        model.set_adapter("first")
    assert_same_training(*models)
    assert not any(".second." in name for name in models[0].state_dict())


def test_adapters_active_together_add_up(source):
    models = pair(source, config(), config(r=2, lora_alpha=1, use_rslora=True))
    for model in models:
        model.base_model.set_adapter(["first", "second"])
    with ExpertsCalls() as calls:
        assert_same_training(*models)
    assert calls.forward == 2


def test_merging_gives_the_weights_that_peft_gives(source):
    models = pair(source, config(), config(r=2))
    for model in models:
        model.merge_adapter(["first", "second"])
    _assert_same_weights(*models)
    _assert_same_logits(*models)
    with models[0].disable_adapter(), models[1].disable_adapter():
        _assert_same_logits(*models)  # which takes the adapters out again
    _assert_same_weights(*models)
    for model in models:
        model.merge_adapter()
        model.unmerge_adapter()
    _assert_same_weights(*models)
    assert_same_training(*models)
    merged = [model.merge_and_unload() for model in models]
    _assert_same_weights(*merged)
    with ExpertsCalls() as calls:
        assert torch.equal(generated(merged[0]), generated(merged[1]))
    assert calls.forward == 2 * 12


def test_transformers_own_mixin_adds_adapters(source):
    model = QWEN3.build()
    stock = stock_twin(model)
    for each in (model, stock):
        each.add_adapter(config(), "first")
    stock.load_state_dict(model.state_dict())
    kernelize_model(model, kernel=source)
    with ExpertsCalls() as calls:
        assert_same_training(model, stock)
    assert (calls.forward, calls.backward) == (2, 2)
    for each in (model, stock):
        each.disable_adapters()
    _assert_same_logits(model, stock)


@pytest.mark.parametrize(
    "tiny",
    [Tiny("mixtral", LOCAL), Tiny("olmoe", {"intermediate_size": 24}), ARIA],
    ids=repr,
)
def test_other_models_run_their_adapters_on_the_kernel(tiny, registered, warnings):
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    model = tiny.build().double()
    stock = stock_twin(model)
    model, stock = (with_adapters(each, config(target_parameters=parameters)) for each in (model, stock))
    stock.load_state_dict(model.state_dict())
    model.set_experts_implementation(OURS)
    with ExpertsCalls() as calls:
        assert_same_training(model.train(), stock.train())
    assert (calls.forward, calls.backward) == (tiny.moe_layers, tiny.moe_layers)
    assert warnings == []


def test_experts_that_the_kernel_cannot_compute_run_peft_s_way(registered, warnings):
    tiny = Tiny("mixtral", {**LOCAL, "hidden_act": "relu"})
    model = tiny.build()
    stock = stock_twin(model)
    adapted = config(target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    model, stock = (with_adapters(each, adapted) for each in (model, stock))
    stock.load_state_dict(model.state_dict())
    model.set_experts_implementation(OURS)
    assert_same_training(model.train(), stock.train())
    assert [line.rpartition(": ")[2] for line in warnings] == ["its activation is ReLU"]


def test_dropout_is_of_training_alone(source):
    model = kernelize_model(get_peft_model(QWEN3.build(), config(target_modules=[], lora_dropout=0.5)), kernel=source)
    stock = with_adapters(stock_twin(QWEN3.build()), config(target_modules=[]))
    stock.load_state_dict({name.replace(".default.", ".first."): x for name, x in model.state_dict().items()})
    _assert_same_logits(model.eval(), stock)
    input_ids = tokens()
    draws = torch.stack([model.train()(input_ids).logits for _ in range(2)])
    assert not torch.equal(*draws)
    torch.manual_seed(0)
    once = model(input_ids).logits
    torch.manual_seed(0)
    assert torch.equal(once, model(input_ids).logits)


def test_dropout_without_the_kernel_is_an_error():
    model = get_peft_model(QWEN3.build(), config(lora_dropout=0.1))
    model.eval()(tokens())
    with pytest.raises(ValueError, match=r"lora_dropout=0.1 needs Qwen3MoeExperts to run on the kernel"):
        model.train()(tokens())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora must be False for experts, got True"),
        ({"use_qalora": True}, "use_qalora must be False for experts, got True"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out must be False for experts, got True"),
        ({"lora_bias": True}, "lora_bias must be False for experts, got True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights must be one of True, False, 'gaussian'.* got 'pissa'"),
        ({"init_lora_weights": "orthogonal"}, "init_lora_weights must be one of"),
    ],
    ids=str,
)
def test_what_experts_cannot_have_is_refused_before_training(changes, message):
    refused = config(target_modules=[], **changes)
    with pytest.raises(ValueError, match=message):
        get_peft_model(QWEN3.build(), refused)
    model = get_peft_model(QWEN3.build(), config())
    with pytest.raises(ValueError, match=message):
        model.add_adapter("second", refused)


def test_adapters_with_different_dropout_are_not_active_together():
    model = with_adapters(QWEN3.build(), config(lora_dropout=0.1), config())
    with pytest.raises(ValueError, match=r"same lora_dropout, got \{'first': 0.1, 'second': 0.0\}"):
        model.base_model.set_adapter(["first", "second"])


def test_mixed_batches_are_refused_as_in_peft(source):
    model, _ = pair(source, config(target_modules=[]), config(target_modules=[]))
    with pytest.raises(ValueError, match="mixed adapter batches"):
        model.eval()(tokens(), adapter_names=["first", "second"])


def test_a_failed_call_leaves_no_adapters_on_the_experts(source):
    model, _ = pair(source, config())
    experts = model.base_model.model.model.layers[0].mlp.experts
    with pytest.raises((TypeError, IndexError, ValueError)):
        experts(torch.zeros(3, 32), torch.zeros(3, 2), torch.zeros(3, 2))
    assert not hasattr(experts.get_base_layer(), "lora")


def _assert_same_logits(model, stock):
    input_ids = tokens()
    assert_close("logits", stock(input_ids).logits, model(input_ids).logits, 1e-5)


def _assert_same_weights(model, stock):
    got, want = model.state_dict(), stock.state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
