"""LoRA of linear layers in 4 bit within their own products: the numbers, what is not made, and what stays PEFT's."""

import copy
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import bnb as peft_bnb
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qwen3_moe_integration import decoding, enable_fused_linear_lora, lora_linear
from tests.integration.quantized import decoded
from tests.kernel.oracle import RATIO, assert_close

Tensor = torch.Tensor

IN, OUT, RANK = 128, 192, 4
SCALING = 1.25
LAYOUTS = {
    "nf4 nested": {"quant_type": "nf4"},
    "fp4 in floats": {"quant_type": "fp4", "compress_statistics": False, "quant_storage": torch.bfloat16},
}


class Layer(nn.Module):
    """A model of one layer, as PEFT is told of it."""

    is_loaded_in_4bit = True

    def __init__(self, device: str, dtype: torch.dtype, bias: bool, **layout: Any):
        super().__init__()
        self.proj = bnb.nn.Linear4bit(IN, OUT, bias, compute_dtype=dtype, **layout).to(dtype).to(device)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def pair(
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    layout: str = "nf4 nested",
    **changes: Any,
) -> tuple[PeftModel, PeftModel]:
    """The layer with an adapter of random factors, and PEFT's own with the same."""
    settings = {"r": RANK, "lora_alpha": SCALING * RANK, "target_modules": ["proj"], "init_lora_weights": False}
    model = get_peft_model(
        Layer(device, dtype, bias, **LAYOUTS[layout]), LoraConfig(**settings | changes), autocast_adapter_dtype=False
    )
    for name, factor in model.named_parameters():
        if "lora_" in name:
            factor.data = factor.data.to(dtype)
    return enable_fused_linear_lora(copy.deepcopy(model)).train(), model.train()


def layer_of(model: PeftModel) -> peft_bnb.Linear4bit:
    return model.base_model.model.proj


def results(model: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Of forward and backward."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    out = model(x)
    out.backward(grad)
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"out": out.detach(), "x": x.grad, **grads}


def reference(model: PeftModel, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """The same in fp64, of the weights as they are decoded; W + BA is built."""
    layer = layer_of(model)
    names = {name: p for name, p in model.named_parameters() if p.requires_grad}
    x, A, B = (leaf.detach().double().requires_grad_() for leaf in (x, *names.values()))
    out = x @ (decoded(layer.base_layer.weight).double() + layer.scaling["default"] * B @ A).t()
    if layer.base_layer.bias is not None:
        out = out + layer.base_layer.bias.double()
    grads = torch.autograd.grad(out, (x, A, B), grad.double())
    return {"out": out.detach(), **dict(zip(("x", *names), grads))}


@pytest.mark.parametrize("shape", [(37,), (3, 5), (1,), ()], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_result_and_gradients_are_those_of_w_plus_ba(device, dtype, layout, bias, shape, fused):
    model, _ = pair(device, dtype, bias, layout)
    x, grad = (torch.randn(*shape, size, device=device, dtype=dtype) for size in (IN, OUT))
    want, got = reference(model, x, grad), results(model, x, grad)
    assert fused == [dtype] and got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == dtype
        assert_close(name, tensor, got[name], RATIO[dtype])


@pytest.mark.parametrize("scaling", [1, SCALING])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_in_16_bits_it_is_no_further_from_fp64_than_peft(device, dtype, scaling):
    squares = {}
    for _ in range(12):
        models = pair(device, dtype, lora_alpha=scaling * RANK)
        x, grad = (torch.randn(2, 61, size, device=device, dtype=dtype) for size in (IN, OUT))
        got = [results(model, x, grad) for model in models]
        for name, want in reference(models[0], x, grad).items():
            errors = torch.stack([(each[name] - want).square().sum() / want.square().sum() for each in got])
            squares[name] = squares.get(name, 0) + errors
    for name, (ours, theirs) in squares.items():
        assert 0 < ours <= 1.05 * theirs, name
    assert squares["out"][0] < 0.9 * squares["out"][1]  # rounded once


def test_what_the_layer_gives_without_its_adapter_is_bitsandbytes_to_the_last_bit(device, dtype):
    model, _ = pair(device, dtype, bias=True)
    layer = layer_of(model)
    layer.lora_B["default"].weight.data.zero_()
    for rows in (1, 3, 50):
        x = torch.randn(rows, IN, device=device, dtype=dtype)
        assert torch.equal(layer(x), layer.base_layer(x))
        with torch.no_grad():
            assert torch.equal(layer(x), layer.base_layer(x))


def test_of_nothing_comes_nothing(device, dtype, fused):
    model, _ = pair(device, dtype)
    x, grad = (torch.empty(2, 0, size, device=device, dtype=dtype) for size in (IN, OUT))
    got = results(model, x, grad)
    assert fused and got.pop("out").shape == (2, 0, OUT) and got.pop("x").shape == (2, 0, IN)
    assert len(got) == 2 and not any(factor.any() for factor in got.values())


class Made(TorchDispatchMode):
    """The ops that have made, or changed, something as large as a layer's input or result."""

    def __init__(self, rows: int):
        super().__init__()
        self.rows, self.large, self.names = rows, [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(func.__name__.split(".")[0])
        if not func.is_view and isinstance(out, Tensor) and out.numel() >= self.rows * IN:
            self.large.append(self.names[-1])
        return out


@pytest.mark.parametrize("scaling", [1, SCALING])
def test_nothing_as_large_as_the_result_is_made_but_by_products(scaling):
    """Nor W + BA: rows are so many that nothing of the weights' size is as large."""
    rows = 2 * OUT
    model, stock = pair(dtype=torch.bfloat16, lora_alpha=scaling * RANK)
    x, grad = (torch.randn(2, rows // 2, size, dtype=torch.bfloat16) for size in (IN, OUT))
    x.requires_grad_()
    with Made(rows) as made:
        torch.autograd.grad(model(x), (x, *(p for p in model.parameters() if p.requires_grad)), grad)
    assert made.large == ["gemm_4bit", "addmm_", "mm", "addmm_"]
    assert not {"clone", "mul", "add"} & set(made.names)
    with Made(rows) as made:
        stock(x).backward(grad)
    assert {"clone", "mul", "add"} <= set(made.large), "PEFT has changed; lora_linear.py may go"


def test_only_what_needs_a_gradient_costs_one(monkeypatch):
    model, stock = pair()
    x, grad = torch.randn(5, IN), torch.randn(5, OUT)
    stock(x).backward(grad)
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "dequantize_4bit", pytest.fail)
        model(x).backward(grad)
    for ours, theirs in zip(model.parameters(), stock.parameters()):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    model.zero_grad()
    layer_of(model).lora_A["default"].requires_grad_(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda x: x):
        out = model(x)
    out.backward(grad)
    assert x.shape not in kept and layer_of(model).lora_A["default"].weight.grad is None
    assert layer_of(model).lora_B["default"].weight.grad.any()


def test_the_result_may_be_changed_in_place():
    """PEFT copies what bitsandbytes gives, in fear of this."""
    model, stock = pair()
    x, grads = torch.randn(2, 6, IN), []
    for each in (model, stock):
        leaf = x.clone().requires_grad_()
        heads = each(leaf).view(2, 6, 4, -1).transpose(1, 2)
        heads.mul_(3)
        heads.square().sum().backward()
        grads.append(leaf.grad)
    assert_close("x", grads[1], grads[0], 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_under_autocast_factors_in_fp32_are_cast_as_by_peft(device, dtype, fused):
    model, stock = pair(device, torch.bfloat16)
    for each in (model, stock):
        for factor in (layer_of(each).lora_A, layer_of(each).lora_B):
            factor.to(torch.float32)
    x, grad = (torch.randn(3, 11, size, device=device, dtype=dtype) for size in (IN, OUT))
    with torch.autocast(device, torch.bfloat16):
        got, want = results(model, x, grad), results(stock, x, grad)
    assert fused == ([torch.bfloat16] if dtype == torch.bfloat16 else [])  # of an input in fp32 PEFT rounds less
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype == (dtype if name in ("out", "x") else torch.float32)
        assert_close(name, tensor, got[name], 2 * RATIO[torch.bfloat16])


def test_backward_within_autocast_is_backward(device):
    model, _ = pair(device)
    x = torch.randn(7, IN, device=device, requires_grad=True)
    (want,) = torch.autograd.grad(model(x).square().sum(), x)
    out = model(x).square().sum()
    with torch.autocast(device, torch.bfloat16):
        (got,) = torch.autograd.grad(out, x)
    assert torch.equal(got, want)


def test_a_weight_that_lost_its_state_finds_it_again(fused):
    """As bitsandbytes has it: FSDP puts bare tensors in the place of its parameters."""
    model, stock = pair()
    base = layer_of(model).base_layer
    base.quant_state = base.weight.quant_state
    base.weight = nn.Parameter(base.weight.data, requires_grad=False)
    x, grad = torch.randn(4, IN), torch.randn(4, OUT)
    got = results(model, x, grad)
    assert fused
    for name, tensor in results(stock, x, grad).items():
        assert_close(name, tensor, got[name], 1e-5)


def _two_active(model: PeftModel) -> None:
    model.add_adapter("second", LoraConfig(r=2, target_modules=["proj"], init_lora_weights=False))
    model.load_state_dict(
        {key: torch.full_like(x, 0.1) for key, x in model.state_dict().items() if "second" in key}, strict=False
    )
    model.base_model.set_adapter(["default", "second"])


def _hooked(name: str, kind: str) -> Callable[[PeftModel], None]:
    def hook(model: PeftModel) -> None:
        getattr(layer_of(model).get_submodule(name), f"register_{kind}_hook")(lambda *_: None)

    return hook


class Twice(bnb.nn.Linear4bit):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


CASES = {
    "several adapters": ({}, _two_active),
    "none": ({}, lambda model: model.base_model.set_adapter([])),
    "switched off": ({}, lambda model: model.base_model.disable_adapter_layers()),
    "merged": ({}, lambda model: model.merge_adapter()),
    "dropout": ({"lora_dropout": 0.5}, lambda model: None),
    "DoRA": ({"use_dora": True}, lambda model: None),
    "bias of the adapter": ({"lora_bias": True, "bias": True}, lambda model: None),
    "bias that is trained": ({"bias": True}, lambda model: layer_of(model).base_layer.bias.requires_grad_()),
    "factors in another dtype": ({}, lambda model: model.double()),
    "computes in another dtype": (
        {},
        lambda model: setattr(layer_of(model).base_layer, "compute_dtype", torch.float16),
    ),
    "base of another class": ({}, lambda model: setattr(layer_of(model).base_layer, "__class__", Twice)),
    "Accelerate's hook on the base": ({}, lambda model: add_hook_to_module(layer_of(model).base_layer, ModelHook())),
}
for part in ("base_layer", "lora_A.default", "lora_B.default", "lora_dropout.default"):
    for kind in ("forward", "forward_pre", "full_backward", "full_backward_pre"):
        CASES[f"{kind} hook on {part}"] = ({}, _hooked(part, kind))


@pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit")
@pytest.mark.parametrize(("settings", "change"), CASES.values(), ids=CASES)
def test_whatever_is_more_than_a_plain_adapter_is_left_to_peft(settings, change, fused):
    model, stock = pair(**settings)
    for each in (model, stock):
        change(each)
    x, grad, both = torch.randn(3, 4, IN), torch.randn(3, 4, OUT), []
    for each in (model, stock):
        torch.manual_seed(7)
        both.append(results(each, x, grad))
    got, want = both
    assert fused == [] and got.keys() == want.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


def test_dropout_in_evaluation_drops_nothing(fused):
    model, stock = pair(lora_dropout=0.5)
    x = torch.randn(6, IN)
    assert_close("out", stock.eval()(x), model.eval()(x), 1e-5)
    assert fused


def test_rows_with_different_adapters_are_left_to_peft(fused):
    models = pair()
    x = torch.randn(3, IN)
    got, want = (layer_of(each.eval())(x, adapter_names=["default", "__base__", "default"]) for each in models)
    assert torch.equal(got, want) and fused == []


def test_what_is_spread_over_devices_or_laid_out_for_inference_is_left_to_peft():
    model, _ = pair()
    layer, x = layer_of(model), torch.randn(3, IN)
    assert layer._plain_lora(x) is not None
    layer.base_layer.weight.quant_state.packing_format_for_cpu = True
    assert layer._plain_lora(x) is None
    layer.base_layer.weight.quant_state.packing_format_for_cpu = False
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        A = layer.lora_A["default"]
        A.weight = nn.Parameter(distribute_tensor(A.weight.data, init_device_mesh("cpu", (1,))))
        assert layer._plain_lora(x) is None
    finally:
        distributed.destroy_process_group()


def test_compiled_it_is_one_graph(fused):
    model, stock = pair()
    torch.compiler.reset()
    x, grad = torch.randn(2, 9, IN), torch.randn(2, 9, OUT)
    layer_of(model).compile(backend="aot_eager", fullgraph=True)
    got = results(model, x, grad)
    for name, tensor in results(stock, x, grad).items():
        assert_close(name, tensor, got[name], 1e-5)
    assert fused == []


def test_models_without_such_a_layer_are_refused():
    with pytest.raises(ValueError, match=r"in 4 bit, got a Layer without; call this after get_peft_model"):
        enable_fused_linear_lora(Layer("cpu", torch.float32, False))
    dense = get_peft_model(nn.Sequential(nn.Linear(3, 3)), LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="got a PeftModel without"):
        enable_fused_linear_lora(dense)
    assert enable_fused_linear_lora(model := pair()[0]) is model  # again, which changes nothing
    assert type(layer_of(model)) is lora_linear.Linear4bit


def test_a_class_that_another_made_of_peft_s_stays():
    class Linear4bit(peft_bnb.Linear4bit):
        pass

    _, model = pair()
    layer_of(model).__class__ = Linear4bit
    assert type(layer_of(enable_fused_linear_lora(model))) is Linear4bit


def _same(models: tuple[PeftModel, PeftModel], x: Tensor) -> None:
    """Results, parameters' names, and files."""
    model, stock = models
    assert_close("out", stock(x), model(x), 1e-5)
    ours, theirs = (each.state_dict() for each in models)
    assert ours.keys() == theirs.keys() and repr(model) == repr(stock)


@pytest.mark.filterwarnings("ignore:(Merge|Unmerge) lora module to 4-bit")
def test_adapters_live_as_in_peft(tmp_path, fused):
    models, x = pair(), torch.randn(5, IN)
    second = LoraConfig(r=2, target_modules=["proj"], init_lora_weights=False)
    for each, folder in zip(models, ("ours", "peft")):
        torch.manual_seed(3)
        each.add_adapter("second", second)
        each.set_adapter("second")
        each.save_pretrained(tmp_path / folder)
    files = [path.relative_to(tmp_path / "ours") for path in (tmp_path / "ours").rglob("*.safetensors")]
    assert len(files) == 2
    assert all((tmp_path / "ours" / file).read_bytes() == (tmp_path / "peft" / file).read_bytes() for file in files)
    _same(models, x)
    base = copy.deepcopy(models[1]).unload()
    loaded = PeftModel.from_pretrained(base, tmp_path / "ours" / "second", adapter_name="second", is_trainable=True)
    assert_close("loaded", models[1](x), enable_fused_linear_lora(loaded).train()(x), 1e-5)
    for change in (
        lambda model: model.delete_adapter("second"),
        lambda model: model.set_adapter("default"),
        lambda model: model.merge_adapter(),
        lambda model: model.unmerge_adapter(),
    ):
        for each in models:
            change(each)
        _same(models, x)
    assert len(fused) == 1 + 1 + 2 + 1  # not while merged
    for each in models:
        with each.disable_adapter():
            assert torch.equal(each(x), layer_of(each).base_layer(x))
    merged = [each.merge_and_unload() for each in models]
    assert type(merged[0].proj) is bnb.nn.Linear4bit and torch.equal(*(each(x) for each in merged))
