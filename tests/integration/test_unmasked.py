"""Calls without a mask ask for no values, and see what they saw; packed and padded rows are masked as ever."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from qwen3_moe_integration import enable_graphed_checkpointing
from tests.host_syncs import host_syncs
from tests.integration import graphs
from tests.integration.lora import config, pair
from tests.integration.models import QWEN3, Tiny, tokens

pytestmark = [pytest.mark.compat, pytest.mark.filterwarnings("ignore:.*without CUDA graphs")]


@pytest.fixture
def twins() -> tuple[nn.Module, nn.Module]:
    """Asks nothing, and as it was."""
    return twins_of(QWEN3)


def twins_of(tiny: Tiny) -> tuple[nn.Module, nn.Module]:
    usual = tiny.build().train()
    return enable_graphed_checkpointing(copy.deepcopy(usual)), usual


def logits(model: nn.Module, **inputs) -> torch.Tensor:
    """Without a cache: with one, Transformers does not look for packed sequences."""
    return model(**{"use_cache": False} | inputs).logits


@pytest.fixture
def asks(monkeypatch):
    """Whether a call looks for packed sequences."""
    files = host_syncs(monkeypatch)

    def asks(model: nn.Module, **inputs) -> bool:
        files.clear()
        logits(model, **inputs)
        return "masking_utils.py" in files

    return asks


def test_a_call_without_a_mask_asks_for_no_values(twins, asks):
    model, usual = twins
    batch = tokens()
    for inputs in ({"input_ids": batch}, {"inputs_embeds": model.get_input_embeddings()(batch).detach()}):
        assert asks(usual, **inputs) and not asks(model, **inputs)
        assert torch.equal(*(logits(each, **inputs) for each in twins))
        assert torch.equal(*(logits(each, **inputs, use_cache=True) for each in twins))
        with torch.no_grad():
            assert not asks(model, **inputs) and torch.equal(*(logits(each, **inputs) for each in twins))
    assert torch.equal(*(each.model(batch, use_cache=False)[0] for each in twins))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.eval(),
        lambda model: model.model.layers[1].eval(),
        lambda model: model.gradient_checkpointing_disable(),
        lambda model: model.gradient_checkpointing_enable(),
        lambda model: model.set_attn_implementation("eager"),
    ],
    ids=["eval", "a layer in eval", "no checkpointing", "the usual checkpointing", "eager"],
)
def test_it_asks_as_ever_where_layers_are_called_otherwise(twins, asks, change):
    batch = tokens()
    for each in twins:
        change(each)
    assert asks(twins[0], input_ids=batch) and torch.equal(*(logits(each, input_ids=batch) for each in twins))


def test_it_asks_nothing_once_graphs_are_enabled_again_and_lets_go_of_those_before(twins, asks):
    before = weakref.ref(twins[0].model.layers[0]._gradient_checkpointing_func)
    enable_graphed_checkpointing(twins[0], keep=["attention"])
    assert not asks(twins[0], input_ids=tokens())
    gc.collect()
    assert before() is None, "whoever holds it holds the memory of its graphs"


def test_packed_sequences_do_not_see_each_other(twins):
    batch = tokens(1, 13)
    positions = torch.cat([torch.arange(5), torch.arange(8)])[None]
    packed, as_it_was = (logits(each, input_ids=batch, position_ids=positions) for each in twins)
    assert torch.equal(packed, as_it_was)
    alone = [logits(twins[0], input_ids=part) for part in batch.split([5, 8], 1)]
    assert torch.allclose(packed, torch.cat(alone, 1), atol=1e-5)
    assert not torch.allclose(packed, logits(twins[0], input_ids=batch), atol=1e-2)


def test_packed_sequences_train_in_graphs_as_without(source, monkeypatch):
    graphs.stand_in(monkeypatch.setattr)
    model = pair(source, config())[0]
    usual = copy.deepcopy(model)
    usual.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    enable_graphed_checkpointing(model)
    for first in (5, None, 9, 5, None):
        batch, inputs = tokens(1, 13), {}
        if first:
            inputs["position_ids"] = torch.cat([torch.arange(first), torch.arange(13 - first)])[None]
        for each in (model, usual):
            each.zero_grad()
            each(input_ids=batch, labels=batch, **inputs).loss.backward()
        for (name, one), (_, other) in zip(graphs.trainable(model), graphs.trainable(usual)):
            assert torch.equal(one.grad, other.grad), name
    assert graphs.recordings(model) == 2 * 2, "with and without a mask"


def test_padded_sequences_do_not_see_the_padding(twins):
    batch = tokens(2, 13)
    mask = torch.ones_like(batch)
    mask[0, :4] = 0
    padded, as_it_was = (logits(each, input_ids=batch, attention_mask=mask) for each in twins)
    assert torch.equal(padded, as_it_was)
    assert not torch.allclose(padded[0], logits(twins[0], input_ids=batch)[0], atol=1e-2)


@pytest.mark.parametrize("cache", [None, "static"])
def test_text_is_generated_the_same(twins, cache):
    batch = tokens(2, 5)
    texts = [
        each.eval().generate(batch, max_new_tokens=6, do_sample=False, cache_implementation=cache, disable_compile=True)
        for each in twins
    ]
    assert torch.equal(*texts)


@pytest.mark.parametrize(
    "tiny", [Tiny("qwen3_moe", {"use_sliding_window": True, "sliding_window": 4}), Tiny("mixtral")], ids=repr
)
def test_other_models_ask_as_ever(tiny, asks):
    twins, batch = twins_of(tiny), tokens()
    assert asks(twins[0], input_ids=batch) and torch.equal(*(logits(each, input_ids=batch) for each in twins))
