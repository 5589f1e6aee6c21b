"""Adapters of experts in training: checkpointed activations, autocast, Accelerate's hooks, Trainer."""

import copy

import pytest
import torch
from accelerate import dispatch_model
from peft import get_peft_model
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, set_seed

from qwen3_moe_integration import kernelize_model
from tests.integration.lora import config, pair, with_adapters
from tests.integration.models import QWEN3, ExpertsCalls, assert_same_training, random_routing, tokens
from tests.kernel.oracle import assert_close


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_layers_draw_the_same_dropout_again(source, use_reentrant):
    model = kernelize_model(get_peft_model(QWEN3.build(), config(lora_dropout=0.3)), kernel=source).train()
    plain = copy.deepcopy(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    seed = torch.initial_seed()

    def call(**kwargs):
        torch.manual_seed(seed)
        return model(**kwargs)

    plain.register_forward_pre_hook(lambda *_: torch.manual_seed(seed) and None)
    with ExpertsCalls() as calls:
        assert_same_training(model, plain, call)
    assert (calls.forward, calls.backward) == (2 + 4, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_under_autocast_adapters_are_about_as_far_from_fp32_as_peft_s(source, dtype):
    """Weights in ``dtype``, factors in fp32 as PEFT keeps them; x A^T is one more thing to round than W + BA, and
    adapters here are as large as the weights. The routing is given: see test_kernelize."""
    experts = [each.base_model.model.model.layers[0].mlp.experts for each in pair(source, config())]
    for each in experts:
        each.get_base_layer().to(dtype)
    exact = copy.deepcopy(experts[1]).double()
    hidden, routing = torch.randn(33, 32), random_routing(33)
    want = exact(hidden.double(), *routing)
    want.square().sum().backward()
    errors = []
    for each in experts:
        with torch.autocast("cpu", torch.bfloat16):
            out = each(hidden, *routing)
        out.square().sum().backward()
        grad = each.base_layer.lora_A["first"].weight.grad
        assert out.dtype == torch.float32 and grad.dtype == torch.float32
        assert_close("gradient of A", exact.base_layer.lora_A["first"].weight.grad, grad.double(), 3e-2)
        errors.append((out - want).norm() / want.norm())
    assert 0 < errors[0] <= 1.5 * errors[1]


def test_adapters_reach_experts_behind_accelerate_s_hooks(source):
    """Transformers puts them on every module of a model that it dispatches, and on each in 4 bit."""
    model = QWEN3.build()
    stock = with_adapters(copy.deepcopy(model), config())
    dispatch_model(model, dict.fromkeys(("model", "lm_head"), "cpu"), main_device="cpu", force_hooks=True)
    assert hasattr(model.model.layers[0].mlp.experts, "_hf_hook")
    model = with_adapters(kernelize_model(model, kernel=source), config())
    stock.load_state_dict(model.state_dict())
    with ExpertsCalls() as calls:
        assert_same_training(model, stock)
    assert (calls.forward, calls.backward) == (2, 2)


class Text(Dataset):
    """The same few sequences, so that the loss falls."""

    def __init__(self):
        self.rows = tokens(12, 10)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, at):
        return {"input_ids": self.rows[at], "labels": self.rows[at]}


def test_a_resumed_trainer_ends_as_one_that_nothing_interrupted(source, tmp_path):
    base, rows = QWEN3.build(), Text()

    def trainer(folder):
        set_seed(3)
        model = get_peft_model(copy.deepcopy(base), config(lora_dropout=0.1, init_lora_weights=True))
        kernelize_model(model, kernel=source)
        arguments = TrainingArguments(
            folder, max_steps=6, save_steps=3, per_device_train_batch_size=4, learning_rate=3e-2, logging_steps=1,
            use_cpu=True, dataloader_pin_memory=False, report_to="none", disable_tqdm=True,
        )  # fmt: skip
        return Trainer(model, arguments, train_dataset=rows)

    whole, resumed = trainer(tmp_path / "run"), trainer(tmp_path / "run")
    set_seed(4)  # the order of the data
    whole.train()
    set_seed(4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    losses = [[entry["loss"] for entry in each.state.log_history if "loss" in entry] for each in (whole, resumed)]
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]
    for (name, want), got in zip(whole.model.named_parameters(), resumed.model.parameters()):
        assert torch.equal(want, got), name
