"""One process and two GPUs: a model whose layers lie on both runs and trains as one that lies on one."""

import copy

import pytest
import torch
from accelerate import dispatch_model

from qwen3_moe_integration import kernelize_model
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
