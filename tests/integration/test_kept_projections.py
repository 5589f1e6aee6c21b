"""Attention's linear layers in 4 bit that are kept from forward: multiplied once a step, and the same gradients."""

import copy
import gc
import threading
from collections import Counter

import pytest
import torch
from peft import get_peft_model
from peft.tuners.lora import bnb as peft_bnb
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qwen3_moe_integration import (
    MoeBitsAndBytesConfig,
    decoding,
    enable_fused_linear_lora,
    enable_graphed_checkpointing,
    graphed,
    lora_linear,
)
from qwen3_moe_integration.kept import KEEPABLE, Kept
from qwen3_moe_integration.kept_projections import KeptProjection
from qwen3_moe_integration.plan import Step
from qwen3_moe_integration.plan.memory import KEPT_BYTES, read_kept_bytes, shapes
from tests.integration import graphs, test_lora_linear_training
from tests.integration.graphs import assert_same_steps, kept, layers, recordings
from tests.integration.lora import config, with_adapters
from tests.integration.models import QWEN3, tokens
from tests.integration.offloading import recordings_of
from tests.integration.quantized import NESTED, SIZES, checkpoint, load
from tests.integration.test_lora_linear import IN, OUT, RANK, layer_of, pair, results

Tensor = torch.Tensor

ATTENTION = KEEPABLE[2:]
WIDTHS = {"q_proj": 4 * 16, "k_proj": 2 * 16, "v_proj": 2 * 16, "o_proj": 64}
"""Of what the layers of ``SIZES`` give, in the order in which they are kept."""
KEEPS = [("o_proj",), ("k_proj", "q_proj"), KEEPABLE]

device = graphs.device
stock = test_lora_linear_training.stock


def twins(model: nn.Module, keep=ATTENTION, offload=()) -> tuple[nn.Module, nn.Module]:
    """In graphs that keep, and checkpointed as usual."""
    usual = copy.deepcopy(model)
    usual.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return enable_graphed_checkpointing(model, keep=keep, offload=offload), usual


def products_of(keep) -> list[tuple[int, ...]]:
    """The shapes of results and low-rank products, for each of these names."""
    return [(2 * 13, columns) for name, width in WIDTHS.items() if name in keep for columns in (width, 4)]


def products_in(tensors: tuple[Tensor, ...], keep=ATTENTION) -> list[tuple[int, ...]]:
    """Those among what is kept: they come last."""
    return [tuple(x.shape) for x in tensors[-len(products_of(keep)) :]]


class Products(TorchDispatchMode):
    """Counts the products of matrices."""

    def __init__(self):
        super().__init__()
        self.made = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if "mm" in name or "linear" in name or "dequant" in name:
            self.made[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_recomputation_is_given_what_forward_computed(bias, dtype):
    model, _ = pair("cpu", dtype, bias)
    x, other = torch.randn(2, 3, 5, IN, dtype=dtype)
    grad, projection = torch.randn(3, 5, OUT, dtype=dtype), KeptProjection(layer_of(model))
    want = results(model, x, grad)
    with torch.no_grad(), projection.forward():
        first = model(x)
    out, low = projection.tensors
    assert torch.equal(first, want["out"]) and (out.shape, low.shape) == ((15, OUT), (15, RANK))
    assert torch.equal(low, x.view(15, IN) @ layer_of(model).lora_A["default"].weight.t())
    for tensor in projection.tensors:
        tensor.fill_(torch.nan)
    with torch.no_grad(), projection.forward():  # again, to the same place
        assert torch.equal(model(x), first)
    assert all(map(torch.equal, projection.tensors, (first.view(15, OUT), low)))
    assert projection.tensors[0] is out and projection.tensors[1] is low and not low.isnan().any()

    for _ in range(2):  # as often as one likes
        leaf = x.clone().requires_grad_()
        model.zero_grad()
        with Products() as products, projection.recomputation():
            again = model(leaf)
        assert not products.made and again.data_ptr() == out.data_ptr() and not out.requires_grad
        again.backward(grad)
        got = {"out": again.detach(), "x": leaf.grad}
        got |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert got.keys() == want.keys() and all(torch.equal(got[name], tensor) for name, tensor in want.items())
    with projection.recomputation():  # of whatever it is asked for
        assert torch.equal(model(other), first)


def test_calls_are_told_apart_by_their_order_and_by_their_form():
    model, _ = pair()
    projection, x, other, longer = KeptProjection(layer_of(model)), *torch.randn(2, 4, IN), torch.randn(7, IN)

    def calls() -> list[Tensor]:
        return [model(x).clone(), model(other).clone(), model(longer).clone()]

    wanted = calls()
    for _ in range(2):
        with torch.no_grad(), projection.forward():
            assert all(map(torch.equal, calls(), wanted))
    with Products() as products, projection.recomputation():
        assert all(map(torch.equal, calls(), wanted))
    assert not products.made
    with projection.recomputation():
        model(x)
        assert torch.equal(model(longer), wanted[2]), "of other sizes than are kept there"
        model(longer)
        assert torch.equal(model(x), wanted[0]), "beyond what is kept"
    places = [x.data_ptr() for x in projection.tensors]
    with torch.no_grad(), projection.forward():  # forward, too, writes to no place of another form
        assert torch.equal(model(longer), wanted[2]) and torch.equal(model(other), wanted[1])
    assert [x.data_ptr() for x in projection.tensors] == places and len(places) == 2 * 3
    with projection.recomputation():
        assert torch.equal(model(longer), wanted[2]) and torch.equal(model(other), wanted[1])


def test_each_of_several_has_what_its_own_layer_computed():
    models = [pair()[0] for _ in range(3)]
    one, two = (KeptProjection(layer_of(model)) for model in models[:2])
    x, other = torch.randn(2, 4, IN)
    first, second, third = (model(x).detach() for model in models)
    with torch.no_grad(), one.forward(), two.forward():
        for model in reversed(models):
            model(x)
    assert torch.equal(one.tensors[0], first) and torch.equal(two.tensors[0], second)
    assert len(one.tensors) == len(two.tensors) == 2
    for outer, inner in ((one, two), (two, one)):
        with outer.recomputation():
            with Products() as products, inner.recomputation():
                assert torch.equal(models[0](other), first) and torch.equal(models[1](other), second)
            assert not products.made
            assert torch.equal(models[2](x), third), "the layer that is not kept"
            assert torch.equal(models[inner is two](x), (first, second)[inner is two]), "and what is not kept any more"
    one.move(torch.zeros_like)
    with one.recomputation(), two.recomputation():
        assert not models[0](x).any() and torch.equal(models[1](x), second)


def test_other_threads_and_what_comes_after_compute_for_themselves():
    (model, _), computed = pair(), []
    projection, x, other = KeptProjection(layer_of(model)), *torch.randn(2, 4, IN)
    with torch.no_grad(), projection.forward():
        given = model(x)
    with projection.recomputation():
        thread = threading.Thread(target=lambda: computed.append(model(other)))
        thread.start()
        thread.join()
        with KeptProjection(layer_of(model)).recomputation():
            computed.append(model(other))
        assert torch.equal(model(other), given), "what is kept is still there"
        with pytest.raises(RuntimeError), projection.recomputation():
            raise RuntimeError
    computed.append(model(other))
    assert len(computed) == 3 and all(map(torch.equal, computed[:2], computed[1:]))


@pytest.mark.parametrize("keep", KEEPS)
def test_training_equals_usual_checkpointing(stock, device, keep, recwarn):
    models = twins(enable_fused_linear_lora(stock), keep)
    assert_same_steps(*models, [tokens(device=device) for _ in range(5)])
    assert not [each for each in recwarn if "without CUDA graphs" in str(each.message)]
    assert recordings(models[0]) == 2
    first, second = kept(models[0])
    assert products_in(first, keep) == products_of(keep)
    assert not {x.data_ptr() for x in first} & {x.data_ptr() for x in second}, "each recording has its own"


@pytest.mark.parametrize("offload", [("o_proj",), KEEPABLE])
def test_offloaded_they_are_the_same(stock, device, offload, monkeypatch):
    graphs.empty_places(monkeypatch.setattr)
    models = twins(enable_fused_linear_lora(stock), KEEPABLE, offload)
    assert_same_steps(*models, [tokens(device=device) for _ in range(5)])
    assert recordings(models[0]) == 2 and products_in(kept(models[0])[0]) == products_of(ATTENTION)
    for recording in recordings_of(models[0]):
        assert products_in(recording.kept.offloaded, offload) == products_of(offload)
        assert offload != ("o_proj",) or len(recording.kept.offloaded) == 2


def test_masks_shapes_and_scaling_may_change(stock, device):
    models = twins(enable_fused_linear_lora(stock), KEEPABLE)
    assert_same_steps(*models, [tokens(length=length, device=device) for length in (13, 7, 13, 7, 7, 13)])
    for model in models:
        for module in model.modules():
            if isinstance(module, lora_linear.Linear4bit):
                module.scaling["first"] *= 3
    assert_same_steps(*models, [tokens(device=device) for _ in range(3)])
    assert recordings(models[0]) == 2 * 3


def test_under_autocast_factors_in_fp32_are_cast(registered, device, tmp_path):
    checkpoint(tmp_path, **SIZES)
    model = with_adapters(load(tmp_path, NESTED, device_map=device), config(target_modules=ATTENTION)).train()
    models = twins(enable_fused_linear_lora(model), KEEPABLE)
    assert_same_steps(*models, [tokens(device=device) for _ in range(4)], autocast=torch.bfloat16)
    assert products_in(kept(models[0])[0]) == products_of(ATTENTION)
    matrices = [x for x in kept(models[0])[0] if x.is_floating_point() and x.dim() == 2]  # without logsumexps
    assert recordings(models[0]) == 2 and {x.dtype for x in matrices} == {torch.bfloat16}


@pytest.mark.parametrize("decodes", [False, True], ids=["bitsandbytes", "the kernel"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_whoever_decodes_they_are_multiplied_once_a_step(registered, device, tmp_path, monkeypatch, decodes, bias):
    monkeypatch.setattr(lora_linear, "can_decode", lambda _: decodes)
    monkeypatch.setattr(decoding, "is_decoded_whole", lambda *_: decodes)
    checkpoint(tmp_path, **SIZES, attention_bias=bias)
    settings = MoeBitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32)
    model = load(tmp_path, settings, dtype=torch.float32, device_map=device)
    model = with_adapters(model, config(target_modules=ATTENTION)).train()
    made, counted, product = [], [], decoding.product
    monkeypatch.setattr(lora_linear, "product", lambda *args: made.append(args[0]) or product(*args))
    models, batch = twins(enable_fused_linear_lora(model)), tokens(device=device)
    assert_same_steps(*models, [batch] * 3)
    for each in models:
        made.clear()
        each(input_ids=batch, labels=batch).loss.backward()
        counted.append(len(made))
    once = 2 * len(ATTENTION)  # of two layers; on a GPU a graph's are launched without a call
    assert counted == [once if device == "cpu" else 0, 2 * once]


@pytest.mark.parametrize("device", ["cpu"], indirect=True)  # where each call multiplies
@pytest.mark.parametrize("name", ATTENTION)
def test_one_kept_alone_is_multiplied_once_and_the_others_twice(stock, device, name, monkeypatch):
    made, product = [], decoding.product
    monkeypatch.setattr(lora_linear, "product", lambda *args: made.append(args[0]) or product(*args))
    models, batch = twins(enable_fused_linear_lora(stock), [name]), tokens(device=device)
    assert_same_steps(*models, [batch] * 3)
    assert [products_in(each, [name]) for each in kept(models[0])] == [products_of([name])] * 2
    assert all(len(each) == 2 for each in kept(models[0]))
    made.clear()
    models[0](input_ids=batch, labels=batch).loss.backward()
    for layer in layers(models[0]):
        counted = {each: made.count(getattr(layer.self_attn, each).base_layer) for each in ATTENTION}
        assert counted == dict.fromkeys(ATTENTION, 2) | {name: 1}


def test_of_a_layer_those_are_kept_that_are_multiplied_here(stock, device):
    model = enable_fused_linear_lora(stock)
    for layer in layers(model):
        layer.self_attn.q_proj.__class__ = peft_bnb.Linear4bit
    models = twins(model)
    assert_same_steps(*models, [tokens(device=device) for _ in range(4)])
    assert [tuple(x.shape) for x in kept(models[0])[0]] == products_of(("k_proj", "v_proj", "o_proj"))


def test_what_peft_computes_is_computed_again(stock, device):
    models = twins(stock)
    assert_same_steps(*models, [tokens(device=device) for _ in range(4)])
    assert kept(models[0]) == [(), ()]


def test_a_model_without_layers_in_4_bit_keeps_none(device):
    model = with_adapters(QWEN3.build(), config(target_modules=ATTENTION, target_parameters=None))
    keeps = Kept(layers(model)[0], KEEPABLE)
    assert [type(part) for part in keeps._parts][-4:] == [KeptProjection] * 4 and keeps.tensors == ()


def test_layers_that_may_change_them_in_place_keep_none(stock):
    """Another model's rotary embeddings may write to what they gave."""
    layer = layers(enable_fused_linear_lora(stock))[0]
    other = nn.Module()
    other.self_attn, other.mlp = layer.self_attn, layer.mlp
    kinds = [[type(part) for part in Kept(each, ATTENTION)._parts] for each in (layer, other)]
    assert [each.count(KeptProjection) for each in kinds] == [4, 0]


def test_of_a_layer_with_a_dense_mlp_they_are_kept(registered, device, tmp_path):
    checkpoint(tmp_path, **SIZES, mlp_only_layers=[0])
    settings = MoeBitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32)
    model = load(tmp_path, settings, dtype=torch.float32, device_map=device)
    models = twins(enable_fused_linear_lora(with_adapters(model, config(target_modules=ATTENTION)).train()))
    assert_same_steps(*models, [tokens(device=device) for _ in range(4)])
    assert not hasattr(layers(models[0])[0].mlp, "experts")
    assert [products_in(each) for each in kept(models[0])] == [products_of(ATTENTION)] * 2


def test_what_can_be_kept_can_be_planned():
    assert tuple(KEPT_BYTES) == KEEPABLE


def test_a_layer_keeps_as_much_as_is_planned(registered, tmp_path, monkeypatch):
    graphs.stand_in(monkeypatch.setattr)
    checkpoint(tmp_path, **SIZES)
    model = get_peft_model(load(tmp_path, NESTED), config(target_modules=ATTENTION), autocast_adapter_dtype=False)
    enable_graphed_checkpointing(enable_fused_linear_lora(model.train()), keep=ATTENTION)
    batch = tokens(2, 50)
    for _ in range(2):
        model(input_ids=batch, labels=batch).loss.backward()
    planned = {name: KEPT_BYTES[name](shapes(QWEN3.build(**SIZES)), Step(50, 2, rank=4)) for name in WIDTHS}
    for each in kept(model):
        assert {name: out.nbytes + low.nbytes for name, out, low in zip(WIDTHS, each[::2], each[1::2])} == planned


def test_of_what_is_kept_backward_reads_as_much_as_is_planned(stock):
    """With Transformers' norms, which read copies in fp32."""
    layer, hidden = layers(enable_fused_linear_lora(stock))[0], torch.randn(1, 50, 64, device=stock.device)
    layer.to(torch.bfloat16)
    for module in layer.modules():
        if isinstance(module, lora_linear.Linear4bit):
            module.base_layer.compute_dtype = torch.bfloat16
    rotary = stock.get_base_model().model.rotary_emb(hidden, torch.arange(50, device=stock.device)[None])
    hidden, rotary = hidden.bfloat16(), tuple(each.bfloat16() for each in rotary)
    keeps, read = Kept(layer, ATTENTION), set()
    with torch.no_grad(), keeps.forward():
        layer(hidden, position_embeddings=rotary)
    pack = lambda tensor: read.add(tensor.untyped_storage().data_ptr()) or tensor  # noqa: E731
    with keeps.recomputation(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(hidden.requires_grad_(), position_embeddings=rotary)
    outs, lows = keeps.tensors[::2], keeps.tensors[1::2]
    assert {x.untyped_storage().data_ptr() for x in lows} <= read
    model, step = shapes(QWEN3.build(**SIZES)), Step(50, rank=4, liger=False)
    for name, out in zip(WIDTHS, outs):
        planned = read_kept_bytes(name, model, step)
        assert planned == (out.nbytes if out.untyped_storage().data_ptr() in read else 0), name


WIDE = {"hidden_size": 128, "moe_intermediate_size": 128, "head_dim": 64}


def in_bf16(tmp_path) -> nn.Module:
    """A model on a GPU, in 4 bit with adapters in bf16."""
    checkpoint(tmp_path, **WIDE)
    model = load(tmp_path, NESTED, device_map="cuda")
    model = get_peft_model(model, config(target_modules=ATTENTION), autocast_adapter_dtype=False)
    return enable_fused_linear_lora(model.train())


@pytest.mark.gpu
@pytest.mark.parametrize("keep", [("o_proj",), KEEPABLE])
@pytest.mark.parametrize("length", [100, 600], ids=["bitsandbytes decodes", "the kernel decodes"])
def test_in_bf16_what_graphs_keep_changes_no_bit(registered, tmp_path, keep, length):
    graphed._warn_once.cache_clear()
    model = in_bf16(tmp_path)
    other = enable_graphed_checkpointing(copy.deepcopy(model))
    model = enable_graphed_checkpointing(model, keep=keep)
    assert_same_steps(model, other, [tokens(4, length, device="cuda") for _ in range(6)])
    assert recordings(model) == recordings(other) == 2 and not any(kept(other))
    assert len(kept(model)[0]) == 2 if keep == ("o_proj",) else len(kept(model)[0]) > 2 * len(ATTENTION)


def allocated() -> int:
    """Bytes on the GPU but for cuBLAS's workspaces: 64 MiB for each stream that recorded, new or met before."""
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


@pytest.mark.gpu
def test_in_bf16_they_take_as_much_memory_as_is_planned(registered, tmp_path):
    taken, batch, first = {}, tokens(4, 8192, device="cuda"), in_bf16(tmp_path)
    for keep in (ATTENTION, (), ATTENTION):  # once more: first, libraries take memory of their own
        model = enable_graphed_checkpointing(copy.deepcopy(first), keep=keep)
        gc.collect()
        before = allocated()
        for _ in range(3):
            model(input_ids=batch, labels=batch).loss.backward()
            model.zero_grad()
        assert recordings(model) == 2
        taken[keep] = allocated() - before
        del model
    model = shapes(QWEN3.build(**WIDE))
    planned = 2 * sum(KEPT_BYTES[name](model, Step(8192, 4, rank=4)) for name in ATTENTION)
    assert taken[ATTENTION] - taken[()] == pytest.approx(planned, rel=0.1)
