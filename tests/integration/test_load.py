"""``register``: the kernel swapped in while Transformers loads a checkpoint, and where the kernel may come from."""

import os
import socket

import pytest
import torch
from kernels import use_kernel_mapping
from transformers import AutoModelForCausalLM

from qwen3_moe_integration import KernelSource, kernelize_model, register
from tests.integration.models import QWEN3, ExpertsCalls, assert_same_training, generated, tokens


@pytest.fixture
def checkpoint(tmp_path) -> str:
    """A checkpoint as one downloads it: per-expert weights in several shards."""
    QWEN3.build().save_pretrained(tmp_path / "checkpoint", max_shard_size="50KB")
    assert len(list((tmp_path / "checkpoint").glob("*.safetensors"))) > 2
    return str(tmp_path / "checkpoint")


@pytest.mark.compat
def test_use_kernels_swaps_the_kernel_in_and_keeps_it_through_train_and_eval(registered, checkpoint):
    stock = AutoModelForCausalLM.from_pretrained(checkpoint, experts_implementation="eager")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, use_kernels=True)
    for switch in (model.eval, model.train, model.eval, model.train):
        switch()
        with ExpertsCalls() as calls:
            assert_same_training(model, stock)
        assert (calls.forward, calls.backward) == (2, 2)
    assert torch.equal(generated(model), generated(stock))


@pytest.mark.compat
def test_experts_implementation_at_load_time_equals_stock(registered, checkpoint):
    stock = AutoModelForCausalLM.from_pretrained(checkpoint, experts_implementation="eager")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, experts_implementation="qwen3_moe_fused")
    with ExpertsCalls() as calls:
        assert_same_training(model, stock)
    assert (calls.forward, calls.backward) == (2, 2)
    assert torch.equal(generated(model), generated(stock))


@pytest.mark.compat
def test_a_model_loaded_with_other_kernels_keeps_this_one_through_train_and_eval(source, checkpoint):
    with use_kernel_mapping({}, inherit_mapping=False):
        model = AutoModelForCausalLM.from_pretrained(checkpoint, use_kernels=True)
        kernelize_model(model, kernel=source)
        for switch in (model.train, model.eval):
            switch()
            with ExpertsCalls() as calls:
                model(tokens())
            assert calls.forward == 2


def test_a_kernel_that_cannot_be_loaded_is_an_error_at_once(tmp_path):
    missing = KernelSource(path=tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="nothing"):
        register(missing)
    with pytest.raises(FileNotFoundError, match="nothing"):
        kernelize_model(QWEN3.build(), kernel=missing)


@pytest.mark.compat
def test_local_kernels_stands_in_for_the_hub_without_a_network(kernel_dir, monkeypatch):
    monkeypatch.setitem(os.environ, "LOCAL_KERNELS", f"somebody/fork={kernel_dir}")
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("asked the network"))
    model = kernelize_model(QWEN3.build(), kernel=KernelSource("somebody/fork", version=3))
    with ExpertsCalls() as calls:
        model(tokens())
    assert calls.forward == 2
