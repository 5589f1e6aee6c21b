"""4-bit checkpoints that users have from elsewhere: not a weight changes when they load."""

import json

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qwen3_moe_integration import legacy_config
from tests.integration.models import QWEN3, Tiny
from tests.integration.quantized import (
    NESTED,
    SIZES,
    assert_same_model,
    checkpoint,
    decoded,
    edit,
    edit_config,
    experts_parameters,
    load,
    same_bits,
)

MIXTRAL = Tiny("mixtral", {"num_local_experts": 8, "intermediate_size": 24})
NESTING = pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])


def quantize(tensors: dict, name: str, nested: bool, quant_type: str = "nf4", blocksize: int = 64) -> torch.Tensor:
    """Replaces a tensor by what bitsandbytes saves of it; returns what it decodes to."""
    packed, state = quantize_4bit(tensors[name], blocksize=blocksize, compress_statistics=nested, quant_type=quant_type)
    tensors[name] = packed
    tensors.update({f"{name}.{key}": x.clone() for key, x in state.as_dict(packed=True).items()})
    return decoded(packed, state)


def mark(folder, **changes) -> None:
    """Has config.json say what Transformers' own bitsandbytes config says."""
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16")
    edit_config(folder, **settings.to_dict() | changes)


def load_legacy(folder):
    return AutoModelForCausalLM.from_pretrained(folder, config=legacy_config(folder), dtype=torch.bfloat16)


def quantize_v4(folder, nested: bool, routers: tuple = ("mlp.gate.weight",)) -> dict[str, torch.Tensor]:
    """Every linear layer on its own, as Transformers 4 had them, routers included; returns what each decodes to."""
    values = {}

    def change(tensors):
        names = [
            name for name in tensors if name.endswith(("_proj.weight", "w1.weight", "w2.weight", "w3.weight", *routers))
        ]
        values.update({name: quantize(tensors, name, nested) for name in names})

    edit(folder, change)
    mark(folder)
    return values


@pytest.mark.compat
@NESTING
def test_experts_that_transformers_4_quantized_one_by_one(registered, tmp_path, nested):
    checkpoint(tmp_path, **SIZES)
    values = quantize_v4(tmp_path, nested)
    saved = load_file(tmp_path / "model.safetensors")
    model = load_legacy(tmp_path)
    for i in range(2):
        prefix = f"model.layers.{i}.mlp.experts"
        experts = model.get_submodule(prefix)
        for stack, parts in ((experts.gate_up_proj, ("gate_proj", "up_proj")), (experts.down_proj, ("down_proj",))):
            names = [[f"{prefix}.{expert}.{part}.weight" for part in parts] for expert in range(8)]
            nibbles = torch.cat([saved[name] for row in names for name in row])
            assert same_bits(stack.data, nibbles)
            assert torch.equal(
                decoded(stack), torch.stack([torch.cat([values[name] for name in row]) for row in names])
            )
            assert stack.quant_state.absmax.dtype == torch.float32 and not stack.quant_state.nested
        router = f"model.layers.{i}.mlp.gate.weight"
        assert same_bits(model.get_parameter(router).data, values[router])
        query = f"model.layers.{i}.self_attn.q_proj.weight"
        assert torch.equal(decoded(model.get_parameter(query)), values[query])
    model.save_pretrained(tmp_path / "ours")
    assert_same_model(model, load(tmp_path / "ours"))


def test_of_a_model_that_calls_its_projections_otherwise(registered, tmp_path):
    checkpoint(tmp_path, MIXTRAL, **SIZES, intermediate_size=64)
    values = quantize_v4(tmp_path, True, ("block_sparse_moe.gate.weight",))
    model = load_legacy(tmp_path)
    prefix = "model.layers.1.block_sparse_moe.experts"
    for stack, parts in (("gate_up_proj", ("w1", "w3")), ("down_proj", ("w2",))):
        rows = [torch.cat([values[f"{prefix}.{i}.{part}.weight"] for part in parts]) for i in range(8)]
        assert torch.equal(decoded(experts_parameters(model)[f"model.layers.1.mlp.experts.{stack}"]), torch.stack(rows))


@pytest.mark.compat
@NESTING
def test_stacks_that_transformers_qwen3_moe_fused_quantized(registered, tmp_path, nested):
    full = experts_parameters(checkpoint(tmp_path, **SIZES))
    values = {}

    def change(tensors):
        for name in [name for name in tensors if ".experts." in name]:
            del tensors[name]
        for layer in range(2):
            gate_up = full[f"model.layers.{layer}.mlp.experts.gate_up_proj"].data
            down = full[f"model.layers.{layer}.mlp.experts.down_proj"].data
            for part, stack in zip(("gate_proj", "up_proj", "down_proj"), (*gate_up.chunk(2, dim=1), down)):
                name = f"model.layers.{layer}.mlp.{part}.weight"
                tensors[name] = stack.contiguous()
                values[name] = quantize(tensors, name, nested)
        for name in [name for name in tensors if "self_attn" in name and "_proj" in name]:
            quantize(tensors, name, nested)

    edit(tmp_path, change)
    mark(tmp_path)
    model = load_legacy(tmp_path)
    for layer in range(2):
        gate, up, down = (values[f"model.layers.{layer}.mlp.{x}_proj.weight"] for x in ("gate", "up", "down"))
        experts = model.model.layers[layer].mlp.experts
        assert torch.equal(decoded(experts.gate_up_proj), torch.cat((gate, up), dim=1))
        assert torch.equal(decoded(experts.down_proj), down)
        assert experts.down_proj.quant_state.nested == nested  # it was one stack before, and stays as it is
    model.save_pretrained(tmp_path / "ours")
    assert_same_model(model, load(tmp_path / "ours"))


@pytest.mark.compat
def test_experts_that_transformers_5_left_in_full_precision_are_quantized(registered, tmp_path):
    checkpoint(tmp_path / "full", **SIZES)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    stock = load(tmp_path / "full", settings)
    stock.save_pretrained(tmp_path / "stock")
    assert json.loads((tmp_path / "stock/config.json").read_text())["quantization_config"]["load_in_4bit"]
    model, want = load_legacy(tmp_path / "stock"), load(tmp_path / "full", NESTED)
    for name, parameter in experts_parameters(want).items():
        got = model.get_parameter(name)
        assert same_bits(got.data, parameter.data) and same_bits(got.quant_state.absmax, parameter.quant_state.absmax)
    query = "model.layers.0.self_attn.q_proj.weight"
    assert same_bits(model.get_parameter(query).data, want.get_parameter(query).data)


def other_rows(tensors):
    """As many rows of gate and up as there should be, but not of each."""
    for expert in range(8):
        for part, rows in (("gate_proj", 72), ("up_proj", 56)):
            name = f"model.layers.1.mlp.experts.{expert}.{part}.weight"
            tensors[name] = torch.randn(rows, 64)
            quantize(tensors, name, True)


def other_columns(tensors):
    """As many weights as there should be, in rows of another length."""
    for name in [f"model.layers.0.mlp.experts.{expert}.down_proj.weight" for expert in range(8)]:
        tensors[name] = torch.randn(32, 128)
        quantize(tensors, name, True)


MISTAKES = [
    (
        lambda tensors: tensors.pop("model.layers.1.mlp.experts.5.up_proj.weight.absmax"),
        r"model.layers.1.mlp.experts.gate_up_proj: the checkpoint has 8 tensors .*up_proj.weight, but 7 absmax",
    ),
    (
        lambda tensors: [tensors.pop(x) for x in [*tensors] if ".1.mlp.experts.7.down_proj" in x],
        r"model.layers.1.mlp.experts.down_proj: its parts must make up \(8, 64, 64\), got 7 of \(64, 64\)",
    ),
    (
        lambda tensors: tensors.update({"model.layers.0.mlp.experts.2.up_proj.weight": torch.zeros(9, 1).byte()}),
        r"gate_up_proj \(mlp.experts.2.up_proj.weight\): 9 bytes instead of 2048",
    ),
    (other_rows, r"1.mlp.experts.gate_up_proj: .* \(8, 128, 64\), got 8 of \(72, 64\), 8 of \(56, 64\)"),
    (other_columns, r"0.mlp.experts.down_proj: .* \(8, 64, 64\), got 8 of \(32, 128\)"),
]


@pytest.mark.parametrize(("damage", "message"), MISTAKES)
def test_a_damaged_checkpoint_is_an_error_that_names_the_tensor(registered, tmp_path, damage, message):
    checkpoint(tmp_path, **SIZES)
    quantize_v4(tmp_path, True)
    edit(tmp_path, damage)
    with pytest.raises(ValueError, match=message):
        load_legacy(tmp_path)


ODD = [
    (lambda name: {"quant_type": "fp4"} if ".experts.3." in name else {}, "must be nf4 with blocksize 64 .*, got fp4"),
    (lambda name: {"blocksize": 128} if ".experts.3." in name else {}, "nf4 with blocksize 64 .*, got nf4 with 128"),
]


@pytest.mark.parametrize(("settings", "message"), ODD)
def test_experts_that_cannot_be_put_together_are_an_error(registered, tmp_path, settings, message):
    def change(tensors):
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            quantize(tensors, name, True, **settings(name))

    checkpoint(tmp_path, **SIZES)
    edit(tmp_path, change)
    mark(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_legacy(tmp_path)


def test_a_block_that_two_experts_share_is_an_error(registered, tmp_path):
    def change(tensors):
        for name in [name for name in tensors if ".experts." in name]:
            quantize(tensors, name, False, blocksize=4096)

    checkpoint(tmp_path, **SIZES | {"moe_intermediate_size": 32})
    edit(tmp_path, change)
    mark(tmp_path, llm_int8_skip_modules=["self_attn"])
    with pytest.raises(ValueError, match=r"a block of 4096 weights belongs to two experts of shape \(64, 32\)"):
        load_legacy(tmp_path)


def test_a_checkpoint_that_bitsandbytes_did_not_quantize_is_an_error(tmp_path):
    QWEN3.build().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="name_or_path must be a 4-bit checkpoint of bitsandbytes, got"):
        legacy_config(tmp_path)
