"""What graphs keep and offload: the same numbers as kept on the device, and as much less of its memory as the host has;
which place has what, and when, is for ``test_places``."""

import copy
import gc
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qwen3_moe_integration import enable_graphed_checkpointing, graphed
from qwen3_moe_integration.kept import KEEPABLE
from qwen3_moe_integration.offload import Offloaded
from tests.integration import graphs
from tests.integration.graphs import assert_same_steps, kept, recordings, trainable
from tests.integration.lora import config, pair
from tests.integration.models import QWEN3, Tiny, tokens
from tests.integration.offloading import (
    assert_same_gradients,
    in_graphs,
    loss,
    model_of,
    offloaded_of,
    twins_of,
)

OFFLOADED = [("attention",), ("experts",), KEEPABLE]


device = graphs.device


@pytest.fixture
def none_is_checkpointed_as_usual(recwarn):
    yield
    assert not [each for each in recwarn if "without CUDA graphs" in str(each.message)]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("offload", OFFLOADED)
def test_training_equals_what_is_kept_on_the_device(source, device, offload, count):
    models = twins_of(source, device, count, offload)
    assert_same_steps(*models, [tokens(device=device) for _ in range(5)])
    assert recordings(models[0]) == recordings(models[1]) == count
    assert all(offloaded_of(models[0])) and not any(offloaded_of(models[1]))


def test_under_autocast(source, device):
    model = pair(source, config())[0].to(device)
    models = in_graphs(model), in_graphs(copy.deepcopy(model), ())
    assert_same_steps(*models, [tokens(device=device) for _ in range(4)], autocast=torch.bfloat16)


def test_dropout_of_the_experts_adapters_is_that_of_forward(source, device):
    model = pair(source, config(target_modules=[], lora_dropout=0.4), tiny=Tiny("qwen3_moe", {"num_hidden_layers": 4}))
    models = in_graphs(model[0].to(device)), in_graphs(copy.deepcopy(model[0]).to(device), ())
    assert_same_steps(*models, [tokens(device=device) for _ in range(5)])


@pytest.mark.parametrize("offload", OFFLOADED)
def test_what_backward_reads_may_come_from_the_host_alone(source, device, offload, monkeypatch):
    graphs.empty_places(monkeypatch.setattr)
    models = twins_of(source, device, 4, offload)
    assert_same_steps(*models, [tokens(device=device) for _ in range(4)])


def test_what_is_on_the_host_is_what_backward_reads(source, device, monkeypatch):
    """Or the test before this one would prove nothing."""
    graphs.empty_places(monkeypatch.setattr)
    model, batch = in_graphs(model_of(source, device, 3)), tokens(device=device)
    for _ in range(2):
        loss(model, batch).backward()
    norms = []
    for lost in (False, True):
        model.zero_grad()
        result = loss(model, batch)
        if lost:
            if device == "cuda":
                torch.cuda.synchronize()
            for each in offloaded_of(model):
                each._host.zero_()
        result.backward()
        norms.append([p.grad.norm().item() for name, p in trainable(model) if "experts" in name])
    assert all(a > 0 and a != b for a, b in zip(*norms))


@pytest.mark.usefixtures("none_is_checkpointed_as_usual")
def test_gradients_add_up_and_evaluation_may_come_between(source, device):
    models, batches = twins_of(source, device), [tokens(device=device) for _ in range(6)]

    def run(model: nn.Module) -> None:
        for batch in batches:
            loss(model, batch).backward()
            with torch.no_grad():
                loss(model, batch)
            loss(model, batch)  # nobody goes back from this one

    assert_same_gradients(models, run)


@pytest.mark.usefixtures("none_is_checkpointed_as_usual")
def test_forms_of_calls_may_alternate(source, device):
    models = twins_of(source, device)
    assert_same_steps(*models, [tokens(length=length, device=device) for length in (13, 7, 13, 7, 7, 13, 13, 7)])
    assert recordings(models[0]) == 2 * 4


@pytest.mark.usefixtures("none_is_checkpointed_as_usual")
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("shapes", [((2, 13), (2, 7)), ((2, 6), (3, 4))], ids=["other sizes", "the same size"])
def test_two_forms_may_wait_for_backward_at_once(source, device, order, shapes):
    models = twins_of(source, device)
    batches = [tokens(*shape, device=device) for shape in shapes]
    assert_same_steps(*models, batches * 2)

    def run(model: nn.Module) -> None:
        losses = [loss(model, batch) for batch in batches]
        for at in order:
            losses[at].backward()

    for _ in range(2):
        assert_same_gradients(models, run)
    assert recordings(models[0]) == 2 * 4


def test_backward_twice_is_right_or_refused(source, device):
    models, batch = twins_of(source, device), tokens(device=device)
    assert_same_steps(*models, [tokens(device=device) for _ in range(2)])

    def run(model: nn.Module) -> None:
        result = loss(model, batch)
        for _ in range(3):
            result.backward(retain_graph=True)

    assert_same_gradients(models, run)
    first = loss(models[0], batch)
    first.backward(retain_graph=True)
    loss(models[0], batch).backward()
    with pytest.raises(RuntimeError, match=r"a second time \(retain_graph=True\) after another forward"):
        first.backward()
    for model in models:
        model.zero_grad()
    assert_same_steps(*models, [tokens(device=device) for _ in range(2)])


def test_a_backward_that_stops_half_way_leaves_nothing_behind(source, device):
    models, batch = twins_of(source, device), tokens(device=device)
    assert_same_steps(*models, [tokens(device=device) for _ in range(2)])

    def run(model: nn.Module) -> None:
        last = [parameter for name, parameter in trainable(model) if "layers.3" in name]
        torch.autograd.grad(loss(model, batch), last)
        loss(model, batch).backward()

    assert_same_gradients(models, run)


def test_two_models_may_train_in_turn(source, device):
    models, others = twins_of(source, device), twins_of(source, device, 3)
    for _ in range(4):
        for each in (models, others):
            assert_same_steps(*each, [tokens(device=device)])
    batch = tokens(device=device)
    losses = [loss(pair_of[0], batch) + loss(pair_of[1], batch) for pair_of in zip(models, others)]
    for each in losses:
        each.backward()
    for (name, parameter), (_, other) in zip(*map(trainable, models)):
        assert torch.equal(parameter.grad, other.grad), name


def test_a_layer_without_experts_on_the_kernel_offloads_what_it_has(source, monkeypatch):
    graphs.stand_in(monkeypatch.setattr)  # a GPU's graph could hold no loop over experts
    stock = pair(source, config(target_parameters=None))[1]
    for offload, offloads in ((KEEPABLE, True), (["experts"], False)):
        model, other = copy.deepcopy(stock), copy.deepcopy(stock)
        assert_same_steps(in_graphs(model, offload), in_graphs(other, ()), [tokens() for _ in range(4)])
        assert [each is not None for each in offloaded_of(model)] == [offloads] * 2


def test_what_is_not_kept_cannot_be_offloaded():
    with pytest.raises(ValueError, match=r"offload must hold names among those of keep, \['attention'\], got \['exp"):
        enable_graphed_checkpointing(QWEN3.build(), keep=["attention"], offload=["experts"])


def test_host_memory_that_cannot_be_pinned_is_an_error_that_names_it(monkeypatch):
    asked = []
    refuses = SimpleNamespace(cudaHostRegister=lambda *what: asked.append(what) or 2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: refuses)
    with pytest.raises(RuntimeError, match=r"1000 bytes of host memory could not be pinned .* offload less"):
        Offloaded._pinned(object(), 1000)
    assert [size for _, size, _ in asked] == [1000]


WIDE = {
    "hidden_size": 256, "moe_intermediate_size": 512, "num_experts_per_tok": 8, "head_dim": 64,
    "initializer_range": 0.02,
}  # fmt: skip
"""Copies of what these layers keep, 130 MiB for 8192 tokens, take longer than the layers."""


@pytest.mark.gpu
@pytest.mark.parametrize("again", range(3))
def test_copies_that_take_longer_than_layers_are_waited_for(source, again):
    graphed._warn_once.cache_clear()
    models = twins_of(source, "cuda", 6, **WIDE)
    assert_same_steps(*models, [tokens(128, 64, device="cuda") for _ in range(10)])
    batches = [tokens(128, 64, device="cuda") for _ in range(4)]

    def accumulate(model: nn.Module) -> None:
        for batch in batches:  # nothing waits for the GPU in here
            loss(model, batch).backward()

    assert_same_gradients(models, accumulate)
    assert recordings(models[0]) == recordings(models[1]) == 6


@pytest.mark.gpu
def test_the_device_has_as_much_memory_more_as_all_but_two_layers_keep(source):
    taken, batch, count, first = {}, tokens(32, 128, device="cuda"), 6, model_of(source, "cuda", 6, **WIDE)
    for offload in (KEEPABLE, (), KEEPABLE):  # once more, for the first time libraries take memory of their own
        model = in_graphs(copy.deepcopy(first), offload)
        gc.collect()
        before = torch.cuda.memory_allocated()
        for _ in range(3):
            loss(model, batch).backward()
            model.zero_grad()
        taken[offload] = torch.cuda.memory_allocated() - before
        a_layer = sum(x.nbytes for x in kept(model)[0])
        del model
    assert taken[()] - taken[KEEPABLE] == pytest.approx((count - 2) * a_layer, rel=0.1)


@pytest.mark.gpu
def test_host_memory_is_pinned_for_as_long_as_the_model_is_there(source):
    model = in_graphs(model_of(source, "cuda", 3))
    for _ in range(2):
        loss(model, tokens(device="cuda")).backward()
    hosts = [each._host for each in offloaded_of(model)]
    assert all(host.is_pinned() for host in hosts)
    del model
    gc.collect()
    assert not any(host.is_pinned() for host in hosts)
