"""One process and two GPUs: a model whose layers lie on both runs and trains as one that lies on one."""

import copy

import pytest
import torch
from accelerate import dispatch_model

from qwen3_moe_integration import MoeBitsAndBytesConfig, kernelize_model
from tests.integration import lora, quantized
from tests.integration.models import QWEN3, ExpertsCalls, generated, tokens
from tests.kernel.oracle import assert_close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
DEVICES = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": 1}
DEVICES |= {"model.norm": 1, "lm_head": 1}


@pytest.mark.parametrize("kernelized", ["before", "after"])
def test_a_model_on_two_gpus_trains_as_on_one(source, kernelized):
    model = QWEN3.build()
    alone = kernelize_model(copy.deepcopy(model).to("cuda:0"), kernel=source)
    if kernelized == "before":
        kernelize_model(model, kernel=source)
    model = dispatch_model(model, DEVICES)
    if kernelized == "after":
        kernelize_model(model, kernel=source)
    input_ids = tokens(device="cuda:0")
    with ExpertsCalls() as calls:
        losses = [each(input_ids, labels=input_ids, use_cache=False).loss for each in (alone, model)]
    assert calls.forward == 2 * 2
    assert_close("loss", *losses, 1e-5)
    for loss in losses:
        loss.backward()
    for (name, want), (_, got) in zip(alone.named_parameters(), model.named_parameters(), strict=True):
        assert_close(name, want.grad, got.grad, 5e-5)
    assert model.model.layers[1].mlp.experts.down_proj.device.index == 1
    assert torch.equal(generated(model).cpu(), generated(alone).cpu())


LAYERS = 4
FOUR_BIT = MoeBitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32)
BOTH = {0: 180_000, 1: 2**30}
"""Bytes a GPU may hold: of layers of 58 kB each, one on the first, where Transformers leaves room for another."""


@pytest.mark.parametrize("saved", ["in full precision", "in 4 bit"])
def test_a_4_bit_model_with_adapters_on_two_gpus_trains_as_on_one(registered, tmp_path, saved):
    quantized.checkpoint(tmp_path / "full", num_hidden_layers=LAYERS, **quantized.SIZES)
    folder, settings = tmp_path / "full", {"config": FOUR_BIT, "dtype": torch.float32}
    if saved == "in 4 bit":
        quantized.load(folder, **settings, device_map="cuda:0").save_pretrained(tmp_path / "packed")
        folder, settings = tmp_path / "packed", {"dtype": torch.float32}
    alone = quantized.load(folder, **settings, device_map="cuda:0")
    both = quantized.load(folder, **settings, device_map="auto", max_memory=dict(BOTH))
    stacks = quantized.experts_parameters(both)
    assert {stack.device.index for stack in stacks.values()} == {0, 1} and len(stacks) == 2 * LAYERS
    alone, both = (lora.with_adapters(model, lora.config()).train() for model in (alone, both))
    trained = {name: p for name, p in alone.named_parameters() if p.requires_grad}
    assert any("experts" in name for name in trained) and any("q_proj" in name for name in trained)
    both.load_state_dict({name: p.detach() for name, p in trained.items()}, strict=False)

    input_ids = tokens(device="cuda:0")
    with ExpertsCalls() as calls:
        outputs = [model(input_ids, labels=input_ids, use_cache=False) for model in (alone, both)]
        for out in outputs:
            out.loss.backward()
    assert calls.forward == calls.backward == 2 * LAYERS
    assert_close("logits", *(out.logits for out in outputs), 1e-5)
    assert_close("loss", *(out.loss for out in outputs), 1e-5)
    grads = {name: p.grad for name, p in both.named_parameters() if p.requires_grad}
    assert grads.keys() == trained.keys() and {grad.device.index for grad in grads.values()} == {0, 1}
    for name, parameter in trained.items():
        assert_close(name, parameter.grad, grads[name], 5e-5)
    assert torch.equal(generated(both).cpu(), generated(alone).cpu())
