"""Linear layers in 4 bit whose weights the kernel decodes: the same bits as by bitsandbytes, only where bitsandbytes
would decode them whole, and only with a kernel that can."""

import ast
import copy
import functools
import pickle
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes.nn import Params4bit
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig

from qwen3_moe_integration import (
    MoeBitsAndBytesConfig,
    decoding,
    enable_fused_linear_lora,
    kernelize_model,
    lora_linear,
)
from qwen3_moe_integration.experts import kernel_in
from tests.integration.lora import config, with_adapters
from tests.integration.quantized import SIZES, checkpoint, load
from tests.integration.test_lora_linear import IN, LAYOUTS, OUT, layer_of, pair, results

Tensor = torch.Tensor

ROWS = decoding.ROWS + 1


class Kernel(ModuleType):
    """The kernel, which notes the dtypes that it is asked to decode to."""

    def __init__(self, kernel: ModuleType):
        super().__init__("a_kernel")
        self.four_bit_weight, self._kernel, self.asked = kernel.four_bit_weight, kernel, []

    def dequantize(self, weight: Any, dtype: Any = None) -> Tensor:
        self.asked.append(dtype or weight.dtype)
        return self._kernel.dequantize(weight, dtype)


@pytest.fixture
def noting(kernel, device, monkeypatch) -> Kernel:
    """Decodes on CPUs too."""
    monkeypatch.setattr(lora_linear, "can_decode", lambda _: True)
    kernel = Kernel(kernel)
    monkeypatch.setitem(sys.modules, kernel.__name__, kernel)
    return kernel


def twins(kernel: Kernel, *args: Any, **kwargs: Any) -> tuple[PeftModel, PeftModel]:
    """The layer of ``pair`` with a kernel that decodes, and with bitsandbytes."""
    model, _ = pair(*args, **kwargs)
    without = copy.deepcopy(model)
    layer_of(model).kernel_name = kernel.__name__
    return model, without


def assert_same(models: tuple[PeftModel, PeftModel], x: Tensor) -> None:
    grad = torch.randn(*x.shape[:-1], OUT, device=x.device, dtype=x.dtype)
    got, want = (results(model, x, grad) for model in models)
    assert got.keys() == want.keys() and want["x"].any()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_results_and_gradients_are_those_with_bitsandbytes_to_the_last_bit(device, dtype, bias, layout, noting):
    models = twins(noting, device, dtype, bias, layout)
    assert_same(models, torch.randn(3, ROWS // 3 + 1, IN, device=device, dtype=dtype))
    assert noting.asked == [dtype] * 2, "in forward and in backward, of one of the two"
    assert_same(models, torch.randn(IN, ROWS, device=device, dtype=dtype).t())
    assert noting.asked == [dtype] * 4


@pytest.mark.parametrize("blocksize", [32, 64, 128])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_so_they_are_with_other_blocks(device, quant_type, blocksize, noting):
    model, _ = twins(noting, device, torch.bfloat16)
    values = torch.randn(OUT, IN, dtype=torch.bfloat16)
    weight = Params4bit(values, requires_grad=False, blocksize=blocksize, quant_type=quant_type)
    layer_of(model).base_layer.weight = weight.to(device)
    without = copy.deepcopy(model)
    layer_of(without).kernel_name = None
    assert_same((model, without), torch.randn(ROWS, IN, device=device, dtype=torch.bfloat16))
    assert len(noting.asked) == 2


def test_a_weight_packed_from_another_dtype_is_rounded_as_by_bitsandbytes(device, noting):
    """Which decodes to the input's dtype in forward, and in backward to the weight's and then casts."""
    models = twins(noting, device, torch.float32)
    for each in models:
        layer_of(each).base_layer.weight.quant_state.dtype = torch.float16
    assert_same(models, torch.randn(ROWS, IN, device=device))
    assert noting.asked == [torch.float32, torch.float16]


def test_few_rows_are_multiplied_by_bitsandbytes(device, noting):
    models = twins(noting, device, torch.bfloat16)
    for rows in (1, ROWS - 1):
        x = torch.randn(rows, IN, device=device, dtype=torch.bfloat16)
        with torch.no_grad():
            models[0](x)
        assert noting.asked == []
        assert_same(models, x)
        assert [noting.asked.pop()] == [torch.bfloat16], "in backward, which has no other way"


@pytest.mark.parametrize("unsettled", ["dtype", "state"])
def test_what_bitsandbytes_finds_out_in_the_first_call_it_still_does(device, unsettled, noting):
    models, x = twins(noting, device), torch.randn(ROWS, IN, device=device)
    for each in models:
        base = layer_of(each).base_layer
        if unsettled == "dtype":
            base.compute_dtype, base.compute_type_is_set = None, False
        else:
            base.quant_state = base.weight.quant_state
            base.weight = nn.Parameter(base.weight.data, requires_grad=False)
    for count in (1, 3):
        assert_same(models, x)
        assert len(noting.asked) == count
    assert layer_of(models[0]).base_layer.compute_dtype == torch.float32


@pytest.mark.filterwarnings("ignore:(Merge|Unmerge) lora module to 4-bit")
def test_the_weight_is_that_of_now(device, noting):
    models, x = twins(noting, device), torch.randn(ROWS, IN, device=device)
    other = Params4bit(torch.randn(OUT, IN), requires_grad=False, quant_type="fp4").to(device)
    for change in (
        lambda model: None,
        lambda model: (model.merge_adapter(), model.unmerge_adapter()),
        lambda model: setattr(layer_of(model).base_layer, "weight", copy.deepcopy(other)),
        lambda model: model.to("cpu").to(device),
    ):
        for each in models:
            change(each)
        assert_same(models, x)
    assert len(noting.asked) == 2 * 4
    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(models[1](leaf).sum(), leaf)
    for each in models:
        out = each(leaf).sum()
        layer_of(each).base_layer.weight.data = torch.zeros_like(other.data)
        assert torch.equal(torch.autograd.grad(out, leaf)[0], want), "backward is of what forward multiplied"


def test_on_a_cpu_bitsandbytes_decodes(kernel, monkeypatch):
    kernel = Kernel(kernel)
    monkeypatch.setitem(sys.modules, kernel.__name__, kernel)
    assert_same(twins(kernel), torch.randn(ROWS, IN))
    assert kernel.asked == []


def names(model: nn.Module) -> set:
    """Of the kernels that its linear layers know."""
    return {module.kernel_name for module in model.modules() if isinstance(module, lora_linear.Linear4bit)}


def with_linear_adapters(folder: Path, settings: BitsAndBytesConfig) -> nn.Module:
    checkpoint(folder, **SIZES)
    return with_adapters(load(folder, settings), config(target_parameters=None))


@pytest.mark.compat
def test_the_kernel_of_the_experts_is_found_whenever_they_have_one(source, kernel, tmp_path, monkeypatch):
    model = with_linear_adapters(tmp_path, BitsAndBytesConfig(load_in_4bit=True))
    assert names(enable_fused_linear_lora(model)) == {None}
    kernelize_model(model, kernel=source)
    assert names(model) == {None}
    assert names(enable_fused_linear_lora(model)) == {kernel_in(model).__name__}
    (name,) = names(pickle.loads(pickle.dumps(lora_linear_of(model))))
    assert sys.modules[name].dequantize is kernel_in(model).dequantize
    monkeypatch.delattr(kernel_in(model), "dequantize")
    assert names(enable_fused_linear_lora(model)) == {None}, "a kernel without that"


@pytest.mark.compat
@pytest.mark.usefixtures("registered")
def test_the_kernel_that_a_model_was_loaded_for_is_found(tmp_path):
    model = enable_fused_linear_lora(with_linear_adapters(tmp_path, MoeBitsAndBytesConfig()))
    assert names(model) == {kernel_in(model).__name__} and hasattr(kernel_in(model), "fused_experts")


def lora_linear_of(model: nn.Module) -> lora_linear.Linear4bit:
    return next(module for module in model.modules() if isinstance(module, lora_linear.Linear4bit))


def test_rows_with_an_odd_number_of_weights_are_bitsandbytes(kernel, monkeypatch):
    monkeypatch.setattr(lora_linear, "kernel_in", lambda _: kernel)
    for inputs, known in ((IN, {kernel.__name__}), (IN + 1, {None})):
        model = nn.Sequential(bitsandbytes.nn.Linear4bit(inputs, 64))
        model.is_loaded_in_4bit = True
        model = get_peft_model(model.to("cpu"), LoraConfig(target_modules=["0"]))
        assert names(enable_fused_linear_lora(model)) == known


GPUS = {
    "T4": (40, 7, 5),
    "A100": (108, 8, 0),
    "A10": (72, 8, 6),
    "RTX 4090": (128, 8, 9),
    "H200": (132, 9, 0),
    "H100 PCIe": (114, 9, 0),
    "B200": (148, 10, 0),
    "RTX 5090": (170, 12, 0),
    "RTX 5060": (30, 12, 0),
    "GB10": (48, 12, 1),
}


def bitsandbytes_decodes_as_it_goes(gpu: tuple[int, int, int]) -> Callable[..., bool]:
    """Its own choice, read from a file that cannot be imported without CUDA."""
    path = Path(bitsandbytes.__file__).parent / "backends" / "cuda" / "ops.py"
    wanted = "_gemm_4bit_use_custom_cuda", "_GEMM_4BIT_CUSTOM_FLOOR_M", "_gemm_4bit_custom_max_m"
    parts = [
        part
        for part in ast.walk(ast.parse(path.read_text()))
        if getattr(part, "name", None) in wanted
        or (isinstance(part, ast.Assign) and getattr(part.targets[0], "id", None) in wanted)
    ]
    known = {"torch": torch, "functools": functools, "_gpu_dispatch_props": lambda _: gpu}
    # The value for CUDA comes first in the file, that for ROCm after it.
    for part in sorted(parts, key=lambda part: -part.lineno):
        exec(compile(ast.Module([part], []), str(path), "exec"), known)
    choose, most = (known[name] for name in (wanted[0], wanted[2]))
    return lambda dtype, rows, out, inputs: rows <= most and choose(0, dtype, rows, out, inputs)


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_no_weight_is_decoded_whole_that_bitsandbytes_would_decode_as_it_goes(gpu):
    custom, sizes = bitsandbytes_decodes_as_it_goes(gpu), [64 * n for n in (1, 4, 8, 24, 32, 40, 64, 96, 128, 224, 600)]
    seen = set()
    for dtype, rows, out, inputs in product(
        [torch.bfloat16, torch.float16, torch.float32], [1, 8, 64, 300, 512, 513, 1024, 1536, 1537, 4096], sizes, sizes
    ):
        theirs, ours = custom(dtype, rows, out, inputs), decoding.is_decoded_whole(rows, out, inputs)
        assert not (theirs and ours), (dtype, rows, out, inputs)
        seen.add((theirs, ours))
    assert len(seen) == 3


def test_a_training_step_of_qwen3_decodes_whole_from_513_tokens_on():
    for out, inputs in ((4096, 2048), (512, 2048), (2048, 4096)):
        assert not any(decoding.is_decoded_whole(rows, out, inputs) for rows in (1, 512))
        assert all(decoding.is_decoded_whole(rows, out, inputs) for rows in (513, 1024, 4096))
