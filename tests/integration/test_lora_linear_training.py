"""Models whose attention in 4 bit has adapters train the same with these fused as with PEFT's own, checkpointed or in
graphs."""

import copy

import pytest
import torch
from peft.tuners.lora import bnb as peft_bnb
from torch import nn

from qwen3_moe_integration import (
    MoeBitsAndBytesConfig,
    decoding,
    enable_fused_linear_lora,
    enable_graphed_checkpointing,
    graphed,
    lora_linear,
)
from qwen3_moe_integration.experts import kernel_in
from tests.integration import graphs
from tests.integration.graphs import assert_same_steps, recordings
from tests.integration.lora import config, with_adapters
from tests.integration.models import GPU_RATIO, RATIO, assert_same_training, tokens
from tests.integration.quantized import SIZES, checkpoint, load

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
CHECKPOINTING = {
    "kept": lambda model: model,
    "reentrant": lambda model: checkpointed(model, use_reentrant=True),
    "not reentrant": lambda model: checkpointed(model, use_reentrant=False),
}


def checkpointed(model: nn.Module, use_reentrant: bool) -> nn.Module:
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    return model


@pytest.fixture
def stock(registered, device, tmp_path) -> nn.Module:
    """Attention and experts in 4 bit, computing in fp32, with adapters."""
    checkpoint(tmp_path, **SIZES)
    settings = MoeBitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32)
    model = load(tmp_path, settings, dtype=torch.float32, device_map=device)
    return with_adapters(model, config(target_modules=ATTENTION)).train()


@pytest.mark.compat
@pytest.mark.parametrize("how", CHECKPOINTING)
def test_a_model_trains_as_with_peft_s_own(stock, device, how, fused):
    model = CHECKPOINTING[how](enable_fused_linear_lora(copy.deepcopy(stock)))
    assert_same_training(model, stock, ratio=RATIO if device == "cpu" else GPU_RATIO)
    layers, again = 2 * len(ATTENTION), how != "kept"
    assert len(fused) == layers * (1 + again), "recomputed by what computed it"


@pytest.fixture
def in_graphs(device, monkeypatch) -> None:
    """Without PEFT's own products."""
    monkeypatch.setattr(peft_bnb.Linear4bit, "forward", None)
    if device == "cpu":
        graphs.stand_in(monkeypatch.setattr)
    graphed._warn_once.cache_clear()


def graphed_and_checkpointed(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    usual = copy.deepcopy(enable_fused_linear_lora(model))
    usual.gradient_checkpointing_enable({"use_reentrant": False})
    return enable_graphed_checkpointing(model), usual


def test_in_graphs_it_trains_as_when_checkpointed(in_graphs, stock, device, fused):
    twins = graphed_and_checkpointed(stock)
    assert_same_steps(*twins, [tokens(device=device) for _ in range(4)])
    for each in twins:
        for module in each.modules():
            if isinstance(module, lora_linear.Linear4bit):
                module.scaling["first"] *= 3
    assert_same_steps(*twins, [tokens(device=device) for _ in range(3)])
    assert recordings(twins[0]) == 2 * 2 and fused


def test_in_graphs_the_kernel_decodes(in_graphs, stock, device, monkeypatch):
    monkeypatch.setattr(lora_linear, "can_decode", lambda _: True)
    monkeypatch.setattr(decoding, "is_decoded_whole", lambda *_: True)
    kernel, shapes = kernel_in(stock), []
    dequantize = kernel.dequantize
    spy = lambda weight, *dtype: shapes.append(weight.shape) or dequantize(weight, *dtype)  # noqa: E731
    monkeypatch.setattr(kernel, "dequantize", spy)
    twins = graphed_and_checkpointed(stock)
    assert_same_steps(*twins, [tokens(device=device) for _ in range(4)])
    assert recordings(twins[0]) == 2
    layers = [module for module in stock.modules() if isinstance(module, lora_linear.Linear4bit)]
    assert {*shapes} == {(1, each.out_features, each.in_features) for each in layers}
    assert len(shapes) >= 4 * 3 * len(layers), "forward, again and backward, of the model without graphs alone"


def test_graphs_cast_factors_that_are_in_fp32(in_graphs, registered, device, tmp_path, fused):
    checkpoint(tmp_path, **SIZES)
    model = load(tmp_path, MoeBitsAndBytesConfig(), device_map=device)
    twins = graphed_and_checkpointed(with_adapters(model, config(target_modules=ATTENTION)).train())
    assert {p.dtype for name, p in model.named_parameters() if "self_attn" in name and "lora" in name} == {
        torch.float32
    }
    assert_same_steps(*twins, [tokens(device=device) for _ in range(4)], autocast=torch.bfloat16)
    assert recordings(twins[0]) == 2 and {*fused} == {torch.bfloat16}
