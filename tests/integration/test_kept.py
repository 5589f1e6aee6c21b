"""What graphs keep from forward to backward: computed once a step, the same gradients, as much memory as is planned."""

import copy
import gc
import importlib
from functools import partial

import pytest
import torch
from peft import get_peft_model
from torch import nn

from qwen3_moe_integration import enable_graphed_checkpointing, graphed
from qwen3_moe_integration.experts import kernel_of
from qwen3_moe_integration.kept import KEEPABLE
from qwen3_moe_integration.kept_experts import kernel_with_experts
from qwen3_moe_integration.plan import Step
from qwen3_moe_integration.plan.memory import KEPT_BYTES, shapes
from tests.integration import graphs
from tests.integration.graphs import assert_same_steps, kept, layers, recordings, trainable
from tests.integration.lora import config, pair
from tests.integration.models import QWEN3, Tiny, tokens
from tests.integration.quantized import NESTED, checkpoint, load

BOTH = ("attention", "experts")
KEPT = [("attention",), ("experts",), BOTH]
WAITS = "what it keeps is that of an earlier forward, which waits for its backward"


device = graphs.device


@pytest.fixture
def none_is_checkpointed_as_usual(recwarn):
    yield
    assert not [each for each in recwarn if "without CUDA graphs" in str(each.message)]


def twins_of(source, device: str, keep=KEEPABLE, tiny: Tiny = QWEN3, **changes) -> tuple[nn.Module, nn.Module]:
    """Two models with the same weights and adapters: in graphs that keep, and checkpointed as usual."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return twins(pair(source, config(**changes), tiny=tiny)[0].to(device, dtype), keep)


def twins(model: nn.Module, keep=KEEPABLE) -> tuple[nn.Module, nn.Module]:
    usual = copy.deepcopy(model)
    usual.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return enable_graphed_checkpointing(model, keep=keep), usual


def kernel_in(model: nn.Module):
    return kernel_of(layers(model)[0].mlp.experts.get_base_layer())


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for _, parameter in trainable(model)]


@pytest.mark.parametrize("keep", KEPT)
@pytest.mark.usefixtures("none_is_checkpointed_as_usual")
def test_training_equals_usual_checkpointing(source, device, keep):
    models = twins_of(source, device, keep)
    assert_same_steps(*models, [tokens(device=device) for _ in range(5)])
    assert recordings(models[0]) == 2
    first, second = kept(models[0])
    wanted = [(2, 4, 13, 8)] * ("attention" in keep) + [(2 * 13 * 2, 2 * 24)] * ("experts" in keep)
    assert [x.shape for x in first if x.shape in wanted] == wanted
    assert not {x.data_ptr() for x in first} & {x.data_ptr() for x in second}, "each recording has its own"


@pytest.mark.parametrize("keep", KEPT)
def test_under_autocast(source, device, keep):
    models = twins(pair(source, config())[0].to(device), keep)
    assert_same_steps(*models, [tokens(device=device) for _ in range(4)], autocast=torch.bfloat16)
    assert recordings(models[0]) == 2 and kept(models[0])[0][0].dtype == torch.bfloat16


def test_experts_are_computed_once_a_step(source, monkeypatch):
    graphs.stand_in(monkeypatch.setattr)
    models, batch, counted = twins_of(source, "cpu"), tokens(), []
    backends = importlib.import_module(f"{kernel_in(models[0]).__name__}.backends")
    passes = {"FORWARD": 0, "BACKWARD": 0}

    def spied(name: str, run, *inputs):
        passes[name] += 1
        return run(*inputs)

    for name in passes:
        table = getattr(backends, name)
        monkeypatch.setitem(table, "cpu", partial(spied, name, table["cpu"]))
    for model in models:
        for _ in range(2):
            model(input_ids=batch, labels=batch).loss.backward()
        passes.update(FORWARD=0, BACKWARD=0)
        model(input_ids=batch, labels=batch).loss.backward()
        counted.append(tuple(passes.values()))
    assert counted == [(2, 2), (4, 2)]  # of two layers


def test_a_kernel_that_keeps_nothing_computes_twice(source, device, monkeypatch):
    models = twins_of(source, device)
    monkeypatch.delattr(kernel_in(models[0]), "keeping")
    assert_same_steps(*models, [tokens(device=device) for _ in range(4)])
    assert [len(each) for each in kept(models[0])] == [2, 2], "attention's"


def test_experts_off_the_kernel_keep_nothing(source, monkeypatch):
    graphs.stand_in(monkeypatch.setattr)
    models = twins(pair(source, config(target_parameters=None))[1], ["experts"])
    assert_same_steps(*models, [tokens() for _ in range(4)])
    assert kept(models[0]) == [(), ()]


def test_only_layers_that_add_their_experts_result_do_without_it(source):
    """Of another model's, gradients may read it."""
    layer = layers(twins_of(source, "cpu")[0])[0]
    assert kernel_with_experts(layer) is kernel_of(layer.mlp.experts.get_base_layer())
    other = nn.Module()
    other.mlp = layer.mlp
    assert kernel_with_experts(other) is None


@pytest.mark.parametrize("keep", KEPT[1:])
def test_dropout_of_the_experts_adapters_is_that_of_forward(source, device, keep):
    """Of no others: what stands in for graphs on a CPU does not repeat random numbers, and these need none."""
    models = twins_of(source, device, keep, target_modules=[], lora_dropout=0.4)
    assert_same_steps(*models, [tokens(device=device) for _ in range(5)])
    assert recordings(models[0]) == 2


@pytest.mark.usefixtures("none_is_checkpointed_as_usual")
def test_masks_and_shapes_may_change_from_call_to_call(source, device):
    models = twins_of(source, device)
    for step, length in enumerate((13, 7, 13, 7, 7, 13)):
        batch = tokens(length=length, device=device)
        mask = torch.ones_like(batch)
        mask[0, : step + 1] = 0
        for model in models:
            model.zero_grad()
            model(input_ids=batch, attention_mask=mask, labels=batch).loss.backward()
        assert all(map(torch.equal, *map(gradients, models))), step
    assert recordings(models[0]) == 2 * 2


def test_a_second_forward_before_the_first_one_s_backward_is_checkpointed_as_usual(source, device):
    models = twins_of(source, device)
    assert_same_steps(*models, [tokens(device=device) for _ in range(2)])
    batches = [tokens(device=device) for _ in range(3)]
    with pytest.warns(UserWarning, match=WAITS):
        for model in models:
            losses = [model(input_ids=batch, labels=batch).loss for batch in batches]
            for at in (1, 0, 2):
                losses[at].backward()
    assert all(map(torch.equal, *map(gradients, models)))
    for model in models:
        model.zero_grad()
    assert_same_steps(*models, batches)


@pytest.mark.parametrize("keep", [(), KEEPABLE])
@pytest.mark.usefixtures("none_is_checkpointed_as_usual")
def test_results_may_be_held_after_backward(source, device, keep):
    models, held = twins_of(source, device, keep), []
    for model in models:
        for batch in (tokens(device=device) for _ in range(4)):
            held.append(model(input_ids=batch, labels=batch))
            held[-1].loss.backward()
    assert recordings(models[0]) == 2


@pytest.mark.usefixtures("none_is_checkpointed_as_usual")
def test_a_forward_that_nobody_goes_back_from_holds_nothing_up(source, device):
    models = twins_of(source, device)
    for _ in range(3):
        assert_same_steps(*models, [tokens(device=device) for _ in range(2)])
        for model in models:
            model(input_ids=tokens(device=device))


@pytest.mark.usefixtures("none_is_checkpointed_as_usual")
def test_backward_twice_is_right_or_refused(source, device):
    models, batch = twins_of(source, device), tokens(device=device)
    assert_same_steps(*models, [tokens(device=device) for _ in range(2)])
    losses = [model(input_ids=batch, labels=batch).loss for model in models]
    for _ in range(2):
        for loss in losses:
            loss.backward(retain_graph=True)
    assert all(map(torch.equal, *map(gradients, models)))
    graphed_model = models[0]
    graphed_model(input_ids=batch, labels=batch).loss.backward()
    with pytest.raises(RuntimeError, match=r"a second time \(retain_graph=True\) after another forward"):
        losses[0].backward()
    graphed_model.zero_grad()
    models[1].zero_grad()
    assert_same_steps(*models, [tokens(device=device) for _ in range(2)])


def test_what_cannot_be_kept_is_named():
    names = "attention, experts, o_proj, k_proj, v_proj, q_proj"
    with pytest.raises(ValueError, match=rf"keep must hold names among {names}, got \['router'\]"):
        enable_graphed_checkpointing(QWEN3.build(), keep=["router"])


@pytest.mark.parametrize("name", BOTH)
def test_a_layer_keeps_as_much_as_is_planned(source, monkeypatch, name):
    graphs.stand_in(monkeypatch.setattr)
    model = pair(source, config(r=4))[0].bfloat16()
    planned = KEPT_BYTES[name](shapes(QWEN3.build()), Step(500, 2, expert_rank=4))
    enable_graphed_checkpointing(model, keep=[name])
    batch = tokens(2, 500)
    for _ in range(2):
        model(input_ids=batch, labels=batch).loss.backward()
    assert [sum(x.nbytes for x in each) for each in kept(model)] == [pytest.approx(planned, rel=0.01)] * 2


WIDE = {"hidden_size": 128, "moe_intermediate_size": 128, "head_dim": 64}


def in_4_bit(tmp_path) -> nn.Module:
    """A model on a GPU, in 4 bit with adapters in bf16, that the fast path computes."""
    checkpoint(tmp_path, **WIDE)
    model = get_peft_model(load(tmp_path, NESTED, device_map="cuda"), config(), autocast_adapter_dtype=False)
    return model.train()


@pytest.mark.gpu
@pytest.mark.parametrize("keep", KEPT)
def test_in_4_bit_what_graphs_keep_changes_no_bit(registered, tmp_path, keep):
    graphed._warn_once.cache_clear()
    model = in_4_bit(tmp_path)
    other = enable_graphed_checkpointing(copy.deepcopy(model))
    model = enable_graphed_checkpointing(model, keep=keep)
    assert_same_steps(model, other, [tokens(4, 100, device="cuda") for _ in range(6)])
    assert recordings(model) == recordings(other) == 2 and all(kept(model)) and not any(kept(other))


@pytest.mark.gpu
@pytest.mark.parametrize("keep", KEPT)
def test_in_4_bit_it_takes_as_much_memory_as_is_planned(registered, tmp_path, keep):
    """The allocator's blocks are up to a MiB larger than what is in them, and its segments up to 20,
    in the pool and outside of it, of either run."""
    taken, reserved, batch = {}, {}, tokens(4, 8192, device="cuda")
    first = in_4_bit(tmp_path)
    for what in (keep, (), keep):  # once more, for the first time libraries take memory of their own
        model = enable_graphed_checkpointing(copy.deepcopy(first), keep=what)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(3):
            model(input_ids=batch, labels=batch).loss.backward()
            model.zero_grad()
        assert recordings(model) == 2
        taken[what] = torch.cuda.memory_allocated() - before
        reserved[what] = torch.cuda.max_memory_reserved() - before
        del model
    planned = 2 * sum(KEPT_BYTES[name](shapes(QWEN3.build(**WIDE)), Step(8192, 4, expert_rank=4)) for name in keep)
    assert taken[keep] - taken[()] == pytest.approx(planned, rel=0.1)
    assert reserved[keep] - reserved[()] <= planned + 80 * 2**20
