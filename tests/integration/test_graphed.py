"""Checkpointing by CUDA graphs equals checkpointing; on a CPU a graph is stood in for by doing its work again."""

import copy
import gc
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.checkpoint import checkpoint

from qwen3_moe_integration import KernelSource, enable_graphed_checkpointing, graphed
from qwen3_moe_integration.experts import kernel_of
from tests.integration import graphs
from tests.integration.graphs import assert_same_steps, checkpoint_of, layers, recordings, trainable
from tests.integration.lora import config, pair
from tests.integration.models import QWEN3, tokens

Tensor = torch.Tensor


device = graphs.device


@pytest.fixture
def twins(kernel_dir, device) -> Iterator[tuple[PeftModel, PeftModel]]:
    """Two models with the same weights and adapters on the kernel: one graphed, one checkpointed as usual."""
    yield twins_of(kernel_dir, device)


def twins_of(kernel_dir, device: str, **changes) -> tuple[PeftModel, PeftModel]:
    model, _ = pair(KernelSource(path=kernel_dir), config(**changes))
    model = model.to(device)
    usual = copy.deepcopy(model)
    usual.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return enable_graphed_checkpointing(model), usual


def test_training_equals_usual_checkpointing_and_replays(twins, device):
    batches = [tokens(device=device) for _ in range(5)]
    assert_same_steps(*twins, batches)
    assert recordings(twins[0]) == 2  # of two layers, from the second step on
    if device == "cpu":
        (recorder,) = graphs.made
        assert (recorder.recorded, recorder.replayed) == (4, 2 * 2 * 4)


def test_layers_alike_share_their_buffers(twins, device):
    assert_same_steps(*twins, [tokens(device=device)] * 3)
    model = twins[0]
    checkpoint = checkpoint_of(layers(model)[0])
    first, second = (known.variants[0].recording for known in checkpoint._known.values())
    assert first.state is second.state and first.grad is second.grad
    assert [*map(id, first.grads)] == [*map(id, second.grads)]
    assert len({*map(id, first.grads)}) == len([*trainable(layers(model)[0])])


def test_backward_leaves_out_the_experts_result(twins, device, monkeypatch):
    """On the CPU it is NaN then, and the gradients are those of the other model all the same."""
    kernel = kernel_of(layers(twins[0])[0].mlp.experts.get_base_layer())
    entered = []

    @contextmanager
    def spied():
        entered.append(1)
        with for_gradients():
            yield

    for_gradients = kernel.for_gradients
    monkeypatch.setattr(kernel, "for_gradients", spied)
    assert_same_steps(*twins, [tokens(device=device)] * 3)
    assert entered


def test_gradients_add_up_over_steps(twins, device):
    batches = [tokens(device=device) for _ in range(4)]
    for model in twins:
        for batch in batches:
            model(input_ids=batch, labels=batch).loss.backward()
    for (name, parameter), (_, other) in zip(trainable(twins[0]), trainable(twins[1])):
        assert torch.equal(parameter.grad, other.grad), name


def test_forwards_alone_are_not_recorded(twins, device):
    """Nothing of backward is compiled yet."""
    batch = tokens(device=device)
    losses = [model(input_ids=batch, labels=batch).loss for model in twins for _ in range(3)]
    assert recordings(twins[0]) == 0
    for loss in losses[2::3]:
        loss.backward()
    assert_same_steps(*twins, [batch] * 2)
    assert recordings(twins[0]) == 2


def test_two_forwards_before_their_backwards(twins, device):
    """Each with a mask of its own."""
    batches = [tokens(device=device) for _ in range(4)]
    masks = [torch.ones_like(batch) for batch in batches]
    for padding, mask in enumerate(masks, 1):
        mask[0, :padding] = 0
    for model in twins:
        for at in ((0, 1), (2, 3), (0, 1)):
            calls = [{"input_ids": batches[i], "labels": batches[i], "attention_mask": masks[i]} for i in at]
            sum(model(**call).loss for call in calls).backward()
    for (name, parameter), (_, other) in zip(trainable(twins[0]), trainable(twins[1])):
        assert torch.equal(parameter.grad, other.grad), name


def test_a_parameter_that_takes_no_part_gets_no_gradient(twins, device):
    batch, model = tokens(device=device), twins[0]
    layers(model)[0].spare = nn.Parameter(torch.ones(3, device=device))
    for _ in range(3):
        model(input_ids=batch, labels=batch).loss.backward()
    assert recordings(model) == 2 and [name for name, p in trainable(model) if p.grad is None] == [
        name for name, _ in trainable(model) if name.endswith("spare")
    ]


def test_each_shape_is_recorded_until_there_are_too_many(kernel_dir, device):
    model, usual = twins_of(kernel_dir, device)
    enable_graphed_checkpointing(model, variants=2)
    assert_same_steps(model, usual, [tokens(length=length, device=device) for length in (13, 7, 13, 7, 13, 7)])
    assert recordings(model) == 2 * 2
    with pytest.warns(UserWarning, match="more than 2 forms"):
        assert_same_steps(model, usual, [tokens(length=5, device=device)] * 3)
    assert recordings(model) == 2 * 2


def assert_same_gradients(twins: tuple[PeftModel, PeftModel], batch: Tensor, **options: Any) -> None:
    grads = []
    for model in twins:
        model.zero_grad()
        model(input_ids=batch, labels=batch, **options).loss.backward()
        grads.append([parameter.grad for _, parameter in trainable(model)])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_a_mask_may_change_from_call_to_call(twins, device):
    for step in range(4):
        batch = tokens(device=device)
        mask = torch.ones_like(batch)
        mask[0, : step + 1] = 0
        assert_same_gradients(twins, batch, attention_mask=mask)
    assert recordings(twins[0]) == 2


def test_a_mask_that_is_filled_behind_autograds_back_is_read_each_step(twins, device):
    """As graphs and kernels do that fill what a training loop keeps."""
    batch, mask = tokens(device=device), torch.zeros(2, 1, 13, 13, device=device)
    for step in range(5):
        version = mask._version
        mask.data[..., : step + 1] = -1e4
        assert mask._version == version
        assert_same_gradients(twins, batch, attention_mask=mask)
    assert recordings(twins[0]) == 2


def test_a_parameter_that_moved_is_read_where_it_is(twins, device):
    assert_same_steps(*twins, [tokens(device=device)] * 3)
    for model in twins:
        for _, parameter in trainable(model):
            parameter.data = parameter.data * 1.5
    assert_same_steps(*twins, [tokens(device=device)] * 3)


def test_an_adapter_switched_off_or_rescaled_changes_the_result(twins, device):
    batch = tokens(device=device)
    assert_same_steps(*twins, [batch] * 3)
    for model in twins:
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.scaling["first"] *= 3
    assert_same_steps(*twins, [batch] * 3)
    for model in twins:
        layers(model)[0].mlp.experts.enable_adapters(False)
    losses = [model(input_ids=batch, labels=batch).loss for model in twins]
    assert torch.equal(*losses)


def test_under_autocast(kernel_dir, device):
    model, usual = twins_of(kernel_dir, device)
    assert_same_steps(model, usual, [tokens(device=device) for _ in range(4)], autocast=torch.bfloat16)
    assert recordings(model) == 2
    assert_same_steps(model, usual, [tokens(device=device) for _ in range(3)])
    assert recordings(model) == 4
    assert_same_steps(model, usual, [tokens(device=device) for _ in range(3)], autocast=torch.float16)
    assert recordings(model) == 6


def test_a_gradient_that_is_wanted_later_is_computed(twins, device):
    """Of the embeddings, and so of what the first layer reads."""
    assert_same_steps(*twins, [tokens(device=device) for _ in range(3)])
    for model in twins:
        model.get_input_embeddings().requires_grad_()
    assert_same_steps(*twins, [tokens(device=device) for _ in range(3)])
    assert recordings(twins[0]) == 2 + 1


def test_options_may_change_from_call_to_call(twins, device):
    """What Transformers passes on to attention, and what that ignores."""
    batch = tokens(device=device)
    for options in ({"is_causal": True}, {"is_causal": False}, {"unknown": False}):
        for _ in range(3):
            assert_same_gradients(twins, batch, **options)
    assert recordings(twins[0]) == 3 * 2


def test_a_mask_that_is_trained_gets_its_gradient(twins, device):
    masks = [torch.zeros(2, 1, 13, 13, device=device, requires_grad=True) for _ in twins]
    batch = tokens(device=device)
    with pytest.warns(UserWarning, match="an input besides hidden_states that requires a gradient"):
        for model, mask in zip(twins, masks):
            for _ in range(3):
                model(input_ids=batch, attention_mask=mask, labels=batch).loss.backward()
    assert torch.equal(*(mask.grad for mask in masks)) and masks[0].grad.any()


def test_what_is_read_on_the_host_is_not_recorded(twins, device):
    """As a length that decides what is launched."""
    length = torch.zeros((), device="meta" if device == "cpu" else "cpu")
    with pytest.warns(UserWarning, match="an input on another device than hidden_states"):
        for _ in range(3):
            assert_same_gradients(twins, tokens(device=device), max_length=length)
    assert recordings(twins[0]) == 0


def test_backward_draws_the_random_numbers_of_its_own_forward(kernel_dir, monkeypatch):
    graphs.stand_in(monkeypatch.setattr)
    model, _ = twins_of(kernel_dir, "cpu")
    batch = tokens()
    model(input_ids=batch, labels=batch).loss.backward()
    sum(model(input_ids=batch, labels=batch).loss for _ in range(2)).backward()
    (recorder,) = graphs.made
    forward, backward = recorder.offsets[:4], recorder.offsets[4:]
    assert forward == [0, 4, 8, 12] and sorted(backward) == forward  # two layers, twice each
    assert recorder.offset == 16  # where the forwards left it


@pytest.mark.gpu
def test_dropout_drops_the_same_as_without_graphs(kernel_dir):
    graphed._warn_once.cache_clear()
    model, usual = twins_of(kernel_dir, "cuda", lora_dropout=0.3)
    assert_same_steps(model, usual, [tokens(device="cuda") for _ in range(5)])
    assert recordings(model) == 2
    batch, losses = tokens(device="cuda"), set()
    for _ in range(4):
        losses.add(model(input_ids=batch, labels=batch).loss.item())
    assert len(losses) == 4  # each replay draws anew


def test_without_a_gradient_nothing_is_recorded(twins, device):
    batch = tokens(device=device)
    with torch.no_grad():
        losses = [model(input_ids=batch, labels=batch).loss for model in twins for _ in range(3)]
    assert all(torch.equal(loss, losses[0]) for loss in losses) and recordings(twins[0]) == 0
    for model in twins:
        model.eval()
    assert torch.equal(*[model(input_ids=batch, labels=batch).loss for model in twins])
    assert recordings(twins[0]) == 0


def test_frozen_layers_before_the_first_trained_one_are_left_alone(twins, device):
    for model in twins:
        layers(model)[0].requires_grad_(False)
    with pytest.warns(UserWarning, match="nothing in it or before it is trained"):
        assert_same_steps(*twins, [tokens(device=device)] * 3)
    assert recordings(twins[0]) == 1


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_are_called(twins, device, kind):
    called = []
    module = layers(twins[0])[1].mlp.gate
    getattr(module, f"register_{kind}_hook")(lambda *_: called.append(kind))
    with pytest.warns(UserWarning, match="its Qwen3MoeTopKRouter has hooks"):
        assert_same_steps(*twins, [tokens(device=device)] * 3)
    assert len(called) >= 3 and recordings(twins[0]) == 1


def test_the_routers_logits_are_recorded_for_the_loss(twins, device):
    batch = tokens(device=device)
    losses = []
    for model in twins:
        for _ in range(3):
            out = model(input_ids=batch, labels=batch, output_router_logits=True)
        losses.append(out.aux_loss)
        assert len(out.router_logits) == 2
    assert torch.equal(*losses) and losses[0] > 0


def test_a_layer_that_cannot_be_recorded_says_so(twins, device, monkeypatch):
    batch = tokens(device=device)
    model = twins[0]
    model(input_ids=batch, labels=batch).loss.backward()

    def fails(self, work):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphed.Device, "record", fails)
    with pytest.raises(RuntimeError, match=r"Qwen3MoeDecoderLayer could not be recorded .* not permitted"):
        model(input_ids=batch, labels=batch)


def test_on_a_cpu_it_is_the_usual_one(kernel_dir, monkeypatch):
    graphed._warn_once.cache_clear()
    model, usual = twins_of(kernel_dir, "cpu")
    with pytest.warns(UserWarning, match="without CUDA graphs: it runs on cpu"):
        assert_same_steps(model, usual, [tokens()] * 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=tokens(), labels=tokens())  # said once


def test_a_call_that_is_not_recorded_leaves_no_tensors_to_the_garbage_collector(kernel_dir, monkeypatch):
    model, _ = twins_of(kernel_dir, "cpu")
    states = []

    def noting(function, hidden_states, *args, **kwargs):
        states.append(weakref.ref(hidden_states))
        return checkpoint(function, hidden_states, *args, **kwargs)

    monkeypatch.setattr(graphed, "checkpoint", noting)
    gc.collect()
    gc.disable()
    try:
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        assert len(states) == 2 and all(state() is None for state in states)
    finally:
        gc.enable()


def test_what_is_no_model_of_transformers_is_refused():
    with pytest.raises(ValueError, match="model must be or contain a model of Transformers, got a Linear"):
        enable_graphed_checkpointing(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="variants must be at least 1, got 0"):
        enable_graphed_checkpointing(QWEN3.build(), variants=0)
