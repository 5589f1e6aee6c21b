"""The two places of what is offloaded: layers take them in turn, the last two find theirs where forward left it, what
the others keep comes back as early as a place is free, and no copy is made that is not needed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qwen3_moe_integration.offload import Claim, Offloaded
from tests.integration import graphs
from tests.integration.graphs import assert_same_steps, kept, layers, recordings
from tests.integration.models import tokens
from tests.integration.offloading import (
    in_graphs,
    loss,
    model_of,
    offloaded_of,
    places_of,
    recordings_of,
    twins_of,
)

COUNTS = range(1, 8)
"""Of layers: fewer than places, as many, more, and more than two turns."""
device = graphs.device


def order_of_a_step(count: int) -> list[tuple[str, int]]:
    """What is asked of a GPU in one step of training, and for which of ``count`` layers."""
    order = [(what, layer) for layer in range(count) for what in ("forward", "store")]
    for layer in reversed(range(count)):
        if 1 <= layer < count - 1:
            order.append(("fetch", layer - 1))  # to the place of the layer after this one
        order.append(("backward", layer))
    return order


@pytest.mark.parametrize("count", COUNTS)
def test_copies_come_as_early_as_a_place_is_free_and_none_that_is_not_needed(source, monkeypatch, count):
    graphs.stand_in(monkeypatch.setattr)
    model, held, order = in_graphs(model_of(source, "cpu", count)), [], []
    for _ in range(2):
        held.append(loss(model, tokens()))  # or what is over would be gone
        held[-1].backward()
    hosts = [each._host for each in offloaded_of(model)]
    memory = [each.place.memory for each in offloaded_of(model)]

    def note(what: Any, name: str, line: Callable[..., tuple[str, int]]) -> None:
        method = getattr(what, name)
        monkeypatch.setattr(what, name, lambda *args, **kw: order.append(line(*args, **kw)) or method(*args, **kw))

    def copied(to: torch.Tensor, source: torch.Tensor, after: Any) -> tuple[str, int]:
        kind, host, place = ("store", to, source) if any(to is each for each in hosts) else ("fetch", source, to)
        layer = next(number for number, each in enumerate(hosts) if host is each)
        assert place is memory[layer] is memory[layer % 2]
        return kind, layer

    note(places_of(model), "copy", copied)
    for number, recording in enumerate(recordings_of(model)):
        note(recording, "_forward", lambda number=number: ("forward", number))
        note(recording, "_backward", lambda number=number: ("backward", number))
    result = loss(model, tokens())
    assert order[-1] == ("forward", count - 1), "nothing is copied while the loss may ask for a number"
    result.backward()
    assert order == order_of_a_step(count)
    assert len({each.data_ptr() for each in memory}) == min(2, count)


@pytest.fixture
def emptied(monkeypatch) -> None:
    """A place has nothing once its layer's backward was issued, and nothing is fetched to one that waits for that."""
    fetch, fill, claims = Offloaded.fetch, Offloaded._fill, []

    def fetch_empty(self: Offloaded, claim: Claim) -> None:
        for done in claims:  # issued before this one
            if done.offloaded.place.holder() is done:
                done.offloaded.place.memory.zero_()
        claims[:] = [claim]
        fetch(self, claim)

    def fill_free(self: Offloaded, claim: Claim) -> None:
        holder = self.place.holder()
        assert holder is None or holder is claim or holder.over
        fill(self, claim)

    monkeypatch.setattr(Offloaded, "fetch", fetch_empty)
    monkeypatch.setattr(Offloaded, "_fill", fill_free)


@pytest.mark.usefixtures("emptied")
@pytest.mark.parametrize("count", COUNTS)
def test_training_equals_what_is_kept_on_the_device(source, device, count):
    models = twins_of(source, device, count)
    assert_same_steps(*models, [tokens(device=device) for _ in range(4)])
    assert recordings(models[0]) == count


def test_two_layers_and_no_more_take_the_device_s_memory(source, device):
    for count in (1, 2, 3, 5):
        model = in_graphs(model_of(source, device, count))
        for _ in range(2):
            loss(model, tokens(device=device)).backward()
        tensors = [x for each in kept(model) for x in each]
        a_layer = sum(x.nbytes for x in kept(model)[0])
        on_device = sum({x.data_ptr(): x.nbytes for x in tensors}.values())
        assert on_device == min(2, count) * a_layer
        assert len({x.untyped_storage().data_ptr() for x in tensors}) == min(2, count)
        for each in offloaded_of(model):
            assert a_layer <= each._host.nbytes == each.place.memory.nbytes < a_layer + 512 * len(kept(model)[0])


@pytest.mark.usefixtures("emptied")
def test_a_layer_recorded_after_its_neighbours_may_have_the_place_of_one(source, device):
    models = twins_of(source, device)
    hooks = [layers(model)[1].register_forward_hook(lambda *_: None) for model in models]
    assert_same_steps(*models, [tokens(device=device) for _ in range(2)])
    for hook in hooks:
        hook.remove()
    assert_same_steps(*models, [tokens(device=device) for _ in range(4)])
    taken = [each.place for each in offloaded_of(models[0])]  # recorded in the order 0, 2, 3, 1
    assert len(set(taken)) == 2 and taken[1] is taken[2] and taken[3] is taken[0]


def test_forms_of_other_sizes_have_places_of_their_own(source, device):
    models = twins_of(source, device, 3)
    assert_same_steps(*models, [tokens(length=length, device=device) for length in (13, 7) * 3])
    sizes = [each.place.memory.nbytes for each in offloaded_of(models[0])]
    assert len(set(sizes)) == 2 and len({each.place for each in offloaded_of(models[0])}) == 2 * 2


def test_what_no_backward_will_read_is_not_copied(source, monkeypatch):
    graphs.stand_in(monkeypatch.setattr)
    model = in_graphs(model_of(source, "cpu", 3))
    for _ in range(2):
        loss(model, tokens()).backward()
    last = offloaded_of(model)[-1]
    last._host.fill_(7)
    loss(model, tokens())
    loss(model, tokens()).backward()
    before = last._host.clone()
    loss(model, tokens())
    for each in offloaded_of(model):
        each.places.catch_up()
    assert torch.equal(last._host, before) and not (before == 7).all()
