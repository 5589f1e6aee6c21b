"""``kernelize_model``: one call, after which a loaded model gives what it gave before, through the kernel."""

import copy
import re

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

from qwen3_moe_integration import KernelSource, kernelize_model
from tests.integration.models import (
    QWEN3,
    ExpertsCalls,
    assert_same_training,
    generated,
    random_routing,
    stock_twin,
    tokens,
)
from tests.kernel.oracle import assert_close


@pytest.mark.compat
@pytest.mark.parametrize("mode", ["training", "inference"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_logits_loss_and_all_gradients_equal_stock(source, mode, implementation):
    model = QWEN3.build()
    stock = stock_twin(model, implementation)
    assert kernelize_model(model, mode, source) is model
    with ExpertsCalls() as calls:
        assert_same_training(model, stock)
    assert (calls.forward, calls.backward) == (2, 2)


@pytest.mark.compat
def test_router_logits_and_aux_loss_are_captured_as_in_stock(source):
    model = QWEN3.build(router_aux_loss_coef=0.5)
    stock = stock_twin(model)
    kernelize_model(model, kernel=source)
    input_ids = tokens()
    want = stock(input_ids, labels=input_ids, output_router_logits=True)
    got = model(input_ids, labels=input_ids, output_router_logits=True)
    assert len(got.router_logits) == len(want.router_logits) == 2
    assert torch.equal(got.router_logits[0], want.router_logits[0])
    assert_close("router logits of layer 1", want.router_logits[1], got.router_logits[1], 1e-5)
    assert_close("aux_loss", want.aux_loss, got.aux_loss, 1e-6)
    assert_close("loss", want.loss, got.loss, 1e-6)
    for each in (want, got):
        each.aux_loss.backward()
    gates = (each.model.layers[0].mlp.gate.weight.grad for each in (stock, model))
    assert_close("gradient of the aux loss", *gates, 1e-5)


@pytest.mark.compat
def test_state_dict_and_saved_checkpoint_do_not_change(source, tmp_path):
    model = QWEN3.build()
    before = dict(model.state_dict())
    model.save_pretrained(tmp_path / "before")
    kernelize_model(model, kernel=source).save_pretrained(tmp_path / "after")
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(after[key].data_ptr() == before[key].data_ptr() for key in before)
    saved = [load_file(tmp_path / folder / "model.safetensors") for folder in ("before", "after")]
    assert "model.layers.1.mlp.experts.7.gate_proj.weight" in saved[1]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0])
    assert (tmp_path / "before/config.json").read_text() == (tmp_path / "after/config.json").read_text()


@pytest.mark.compat
@pytest.mark.parametrize("mode", ["training", "inference"])
def test_generate_gives_the_same_greedy_tokens(source, mode):
    model = QWEN3.build()
    stock = stock_twin(model)
    with ExpertsCalls() as calls:
        got = generated(kernelize_model(model, mode, source))
    assert calls.forward == 2 * 12
    assert torch.equal(got, generated(stock))


def test_the_swap_lasts_through_train_and_eval_and_can_be_repeated(source):
    model = kernelize_model(kernelize_model(QWEN3.build(), "inference", source), "training", source)
    for switch in (model.train, model.eval, model.train):
        switch()
        with ExpertsCalls() as calls:
            model(tokens())
        assert calls.forward == 2


def test_a_copy_of_a_kernelized_model_runs_on_its_own_weights(source):
    model = kernelize_model(QWEN3.build(), kernel=source)
    twin = copy.deepcopy(model)
    input_ids = tokens()
    want = model(input_ids).logits
    for parameter in model.parameters():
        parameter.data.zero_()
    with ExpertsCalls() as calls:
        assert torch.equal(twin(input_ids).logits, want)
    assert calls.forward == 2


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_stock_gradients(source, use_reentrant):
    model = QWEN3.build()
    stock = stock_twin(model)
    kernelize_model(model, kernel=source).train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    with ExpertsCalls() as calls:
        assert_same_training(model, stock)
    assert (calls.forward, calls.backward) == (4, 2)


def test_under_autocast_experts_are_no_further_from_fp32_than_stock(source):
    """Compared with the routing given: in bf16 a router near a tie takes other experts, whoever computes them."""
    experts = QWEN3.build(experts_implementation="eager").model.layers[0].mlp.experts
    stock = copy.deepcopy(experts)
    kernelize_model(experts, kernel=source)
    hidden, routing = torch.randn(33, 32), random_routing(33)
    want = stock(hidden, *routing)
    errors = []
    for each in (experts, stock):
        with torch.autocast("cpu", torch.bfloat16):
            out = each(hidden, *routing)
        assert out.dtype == torch.float32
        out.square().sum().backward()
        errors.append((out - want).norm() / want.norm())
    assert 0 < errors[0] <= 1.2 * errors[1]
    assert_close("gradient", stock.gate_up_proj.grad, experts.gate_up_proj.grad, 2e-2)


def test_experts_compute_in_the_dtype_of_their_weights(source):
    """A norm kept in fp32 hands the experts fp32 tokens; Transformers casts them to the weights' dtype and back."""
    experts = QWEN3.build(experts_implementation="grouped_mm").model.layers[0].mlp.experts.to(torch.bfloat16)
    stock = copy.deepcopy(experts)
    kernelize_model(experts, kernel=source)
    hidden, routing = torch.randn(33, 32), random_routing(33)
    got, want = experts(hidden, *routing), stock(hidden, *routing)
    assert got.dtype == want.dtype == torch.float32
    assert_close("output", want, got, 1e-2)


def test_other_kernels_in_the_model_stay(source):
    model = QWEN3.build()
    norm = model.model.norm
    norm.forward = lambda hidden_states: hidden_states * 0
    kernelize_model(model, kernel=source)
    assert isinstance(norm, Qwen3MoeRMSNorm)
    assert not model(tokens()).logits.any()


def test_offloaded_weights_are_brought_back_for_the_kernel(source, tmp_path):
    from accelerate import cpu_offload

    model = QWEN3.build()
    stock = stock_twin(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    kernelize_model(model, "inference", source)
    assert model.model.layers[0].mlp.experts.gate_up_proj.is_meta
    input_ids = tokens()
    with ExpertsCalls() as calls, torch.no_grad():
        got = model(input_ids).logits
    assert calls.forward == 2
    assert_close("logits", stock(input_ids).logits, got, 1e-5)


def test_errors_name_the_argument_and_leave_the_model_alone(source):
    model = QWEN3.build(hidden_act="relu")
    for mode in ("train", ["training"]):
        with pytest.raises(ValueError, match=rf"mode must be .* got {re.escape(repr(mode))}"):
            kernelize_model(model, mode, source)
    with pytest.raises(TypeError, match="model must be a module, got 'Qwen/Qwen3-30B-A3B'"):
        kernelize_model("Qwen/Qwen3-30B-A3B", kernel=source)
    with pytest.raises(TypeError, match="kernel must be a KernelSource, got 'org/qwen3-moe-fused'"):
        kernelize_model(model, kernel="org/qwen3-moe-fused")
    with pytest.raises(ValueError, match="Qwen3MoeExperts that the kernel cannot compute: its activation is ReLU"):
        kernelize_model(model, kernel=source)
    with pytest.raises(ValueError, match="model must contain a Qwen3MoeSparseMoeBlock, got a Linear"):
        kernelize_model(nn.Linear(2, 2), kernel=source)
    with pytest.raises(ValueError, match="only one of revision, lockfile and path"):
        KernelSource(revision="main", path=".")
    assert not any("forward" in vars(module) for module in model.modules())
