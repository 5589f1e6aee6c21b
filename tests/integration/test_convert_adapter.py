"""Adapters between layouts: nothing is lost, stock PEFT reads what it should, and what is no adapter is refused."""

import copy
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qwen3_moe_integration.convert import ADAPTER_FORMATS, convert_adapter
from tests.conftest import ROOT
from tests.integration import peft_0_18
from tests.integration.adapters import (
    EXPERT_PROJECTIONS,
    V4Adapter,
    additions,
    assert_same_additions,
    assert_same_tensors,
    load,
    save,
)
from tests.integration.models import QWEN3, SIZES, tokens
from tests.kernel.oracle import assert_close

PLAIN = V4Adapter()
ONE_SCALING = {
    "plain": PLAIN,
    "bf16": V4Adapter(H=9, I=3, E=5, dtype=torch.bfloat16),
    "ranks, one scaling": V4Adapter(
        ranks={"gate_proj": 3, "up_proj": 5, "down_proj": 1}, alphas={"gate_proj": 6, "up_proj": 10}
    ),
    "rslora": V4Adapter(r=3, rslora=True, ranks={"q_proj": 5, "down_proj": 2}, alphas={"down_proj": 1.5}),
    "third layer": V4Adapter(layers=(2,), config={"layers_to_transform": [2]}),
    "down alone": V4Adapter(projections=("down_proj",)),
    "gate alone": V4Adapter(projections=("gate_proj",)),
    "one expert": V4Adapter(E=1),
    "a layer without down": V4Adapter(lacks=r"0\.mlp.*down_proj"),
    "a layer with down alone": V4Adapter(lacks=r"1\.mlp.*(gate|up)_proj"),
}
TWO_SCALINGS = {
    "ranks": V4Adapter(ranks={"gate_proj": 3, "up_proj": 5}),
    "rslora ranks": V4Adapter(rslora=True, ranks={"gate_proj": 3, "up_proj": 4}, alphas={"up_proj": 7}),
}
MODEL = {"H": SIZES["hidden_size"], "I": SIZES["moe_intermediate_size"], "E": SIZES["num_experts"]}


def cases(adapters):
    return pytest.mark.parametrize("adapter", adapters.values(), ids=adapters.keys())


@cases(ONE_SCALING)
@pytest.mark.parametrize("first", ADAPTER_FORMATS)
@pytest.mark.parametrize("second", ADAPTER_FORMATS)
def test_any_way_through_the_layouts_and_back_gives_the_same_bits(tmp_path, adapter, first, second):
    source = adapter.save(tmp_path / "v4")
    convert_adapter(source, tmp_path / "first", first, check=True)
    convert_adapter(tmp_path / "first", tmp_path / "second", second, check=True)
    convert_adapter(tmp_path / "second", tmp_path / "back", "per-expert", check=True)
    convert_adapter(tmp_path / "second", tmp_path / "first again", first)
    assert_same_tensors(source, tmp_path / "back")
    assert_same_tensors(tmp_path / "first", tmp_path / "first again")
    if adapter.projections == EXPERT_PROJECTIONS:
        assert_same_additions(source, tmp_path / "first")
        assert_same_additions(source, tmp_path / "second")


@cases(TWO_SCALINGS)
@pytest.mark.parametrize("to", ADAPTER_FORMATS)
def test_scalings_of_gate_and_up_that_differ_keep_the_products(tmp_path, adapter, to):
    source = adapter.save(tmp_path / "v4")
    convert_adapter(source, tmp_path / "to", to, check=True)
    convert_adapter(tmp_path / "to", tmp_path / "back", "per-expert", check=True)
    assert_same_additions(source, tmp_path / "to", 1e-6)
    assert_same_additions(source, tmp_path / "back", 1e-6)


def test_two_adapters_of_gate_and_up_become_one_of_their_joint_rank_and_one_stays_one(tmp_path):
    adapter = V4Adapter(ranks={"gate_proj": 2, "up_proj": 3}, alphas={"gate_proj": 4, "up_proj": 6})
    convert_adapter(adapter.save(tmp_path / "v4"), tmp_path / "peft", "peft")
    key = "base_model.model.model.layers.1.mlp.experts.base_layer.lora_{}.weight"
    tensors, config = load(tmp_path / "peft")
    assert tensors[key.format("A")].shape == (5 * adapter.E, adapter.H)
    assert config["rank_pattern"] == {"gate_up_proj": 5} and config["alpha_pattern"] == {"gate_up_proj": 10}
    assert config["target_parameters"] == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    assert config["target_modules"] == ["q_proj"]

    # An adapter of PEFT's own shares A, so that B has no zeros: gate and up get its rank, not half or double.
    shared = {**tensors, key.format("B"): torch.randn(2 * adapter.I, 5 * adapter.E)}
    convert_adapter(save(tmp_path / "shared", shared, config), tmp_path / "apart", "per-expert")
    apart, _ = load(tmp_path / "apart")
    expert = "base_model.model.model.layers.1.mlp.experts.2.{}_proj.lora_A.weight"
    assert apart[expert.format("gate")].shape == (5, adapter.H)
    assert torch.equal(apart[expert.format("gate")], apart[expert.format("up")])
    convert_adapter(tmp_path / "apart", tmp_path / "shared again", "peft")
    assert_same_tensors(tmp_path / "shared", tmp_path / "shared again")


RANKS_3_AND_5 = V4Adapter(ranks={"gate_proj": 3, "up_proj": 5}, alphas={"gate_proj": 6, "up_proj": 10})


def untrained(tensors):
    return {key: torch.zeros_like(tensor) if "lora_B" in key else tensor for key, tensor in tensors.items()}


def with_zero_columns(tensors):
    """As training leaves a column of B whose row of A has met zeros alone."""
    zeroed = {"gate_proj.lora_B": 2, "up_proj.lora_B": 0}
    for key, tensor in tensors.items():
        for name, column in zeroed.items():
            if name in key:
                tensor[:, column] = 0
    return tensors


def with_one_A(tensors):
    return {key: tensors[key.replace("up_proj.lora_A", "gate_proj.lora_A")].clone() for key in tensors}


@pytest.mark.parametrize(
    "adapter, change",
    [
        (PLAIN, untrained),
        (RANKS_3_AND_5, untrained),
        (RANKS_3_AND_5, with_zero_columns),
        (V4Adapter(r=1), lambda tensors: with_one_A(untrained(tensors))),
        (V4Adapter(r=4), lambda tensors: with_one_A(untrained(tensors))),
        (V4Adapter(projections=("gate_proj", "down_proj")), untrained),
        (V4Adapter(projections=("up_proj",)), untrained),
    ],
    ids=["equal ranks", "3 and 5", "3 and 5, zero columns", "one A", "one A of rank 4", "gate", "up"],
)
def test_columns_of_zeros_come_back_to_the_projection_that_had_them(tmp_path, adapter, change):
    source = save(tmp_path / "v4", change(adapter.tensors()), adapter.adapter_config())
    convert_adapter(source, tmp_path / "peft", "peft", check=True)
    convert_adapter(tmp_path / "peft", tmp_path / "again", "peft", check=True)
    convert_adapter(tmp_path / "again", tmp_path / "back", "per-expert", check=True)
    assert_same_tensors(source, tmp_path / "back")


def test_an_adapter_that_stock_peft_saved_again_before_training_keeps_its_products_alone(tmp_path):
    """The record of gate's columns is in the metadata, which PEFT leaves out: then gate and up have half of them."""
    adapter = replace(RANKS_3_AND_5, **MODEL)
    source = save(tmp_path / "v4", untrained(adapter.tensors()), adapter.adapter_config())
    convert_adapter(source, tmp_path / "peft", "peft")
    PeftModel.from_pretrained(QWEN3.build(), tmp_path / "peft").save_pretrained(tmp_path / "saved")
    convert_adapter(tmp_path / "saved", tmp_path / "back", "per-expert", check=True)
    tensors, _ = load(tmp_path / "back")
    assert {len(tensor) for key, tensor in tensors.items() if re.search("(gate|up)_proj.lora_A", key)} == {4}


@pytest.mark.parametrize("recorded", ["0", "1", "99", "shared", "-1", "many", ""])
def test_a_record_that_contradicts_the_factors_changes_no_product(tmp_path, recorded):
    source = RANKS_3_AND_5.save(tmp_path / "v4")
    convert_adapter(source, tmp_path / "peft", "peft")
    tensors, _ = load(tmp_path / "peft")
    with safe_open(tmp_path / "peft" / "adapter_model.safetensors", "pt") as file:
        metadata = {key: value if key == "format" else recorded for key, value in file.metadata().items()}
    assert len(metadata) == 3
    save_file(tensors, tmp_path / "peft" / "adapter_model.safetensors", metadata)
    convert_adapter(tmp_path / "peft", tmp_path / "back", "per-expert", check=True)
    assert_same_additions(source, tmp_path / "back")


def add_to_weights(model, folder):
    """Adds what the adapter adds, by its definition, to the weights of a model in fp64."""
    with torch.no_grad():
        for name, delta in additions(folder).items():
            owner, _, projection = name.rpartition(".")
            if ".experts." not in name:
                model.get_submodule(name).weight += delta
                continue
            block, _, e = owner.rpartition(".")
            experts, half = model.get_submodule(block), delta.shape[0]
            if projection == "down_proj":
                experts.down_proj[int(e)] += delta
            else:
                first = half * (projection == "up_proj")
                experts.gate_up_proj[int(e), first : first + half] += delta
    return model.eval()


@cases(
    {
        "plain": V4Adapter(**MODEL),
        "rslora": V4Adapter(**MODEL, r=3, rslora=True),
        "patterns": V4Adapter(**MODEL, ranks={"gate_proj": 3, "up_proj": 5, "q_proj": 2}, alphas={"down_proj": 5}),
        "one layer": V4Adapter(**MODEL, layers=(1,), config={"layers_to_transform": [1]}),
        "a layer without down": V4Adapter(**MODEL, lacks=r"1\.mlp.*down_proj"),
        "a layer with down alone": V4Adapter(**MODEL, lacks=r"0\.mlp.*(gate|up)_proj"),
    }
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_stock_peft_loads_the_peft_layout_and_gives_what_the_v4_adapter_gives(tmp_path, adapter, dtype):
    source = adapter.save(tmp_path / "v4")
    convert_adapter(source, tmp_path / "peft", "peft")
    base = QWEN3.build(dtype=dtype)
    base.save_pretrained(tmp_path / "base")
    double = type(base).from_pretrained(tmp_path / "base", dtype=torch.float64, experts_implementation="eager")
    want = add_to_weights(double, source)
    got = PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    adapted = {name.partition(".lora_A")[0] for name, _ in got.named_parameters() if ".lora_A" in name}
    assert len(adapted) == len({re.sub(r"\d+\.(gate|up)_proj|\d+\.(?=down)", "", name) for name in additions(source)})
    input_ids = tokens()
    if dtype == torch.float32:  # in bf16 a token now and then goes to another expert
        assert_close("logits", want(input_ids).logits, got(input_ids).logits, 1e-5)
    merged = got.merge_and_unload().state_dict()
    for name, weight in want.state_dict().items():
        assert_close(name, weight, merged[name], 1e-6 if dtype == torch.float32 else 1e-2)


def test_stock_peft_loads_the_router_and_a_dense_layer_beside_experts(tmp_path):
    adapter = V4Adapter(**MODEL, layers=(1,))
    I, tensors = SIZES["intermediate_size"], adapter.tensors()
    for module, width, height in (
        ("0.mlp.gate_proj", 32, I),
        ("0.mlp.up_proj", 32, I),
        ("0.mlp.down_proj", I, 32),
        ("1.mlp.gate", 32, 8),
    ):
        prefix = f"base_model.model.model.layers.{module}.lora_"
        tensors[f"{prefix}A.weight"], tensors[f"{prefix}B.weight"] = torch.randn(4, width), torch.randn(height, 4)
    source = save(tmp_path / "v4", tensors, adapter.adapter_config())
    convert_adapter(source, tmp_path / "peft", "peft", check=True)
    convert_adapter(tmp_path / "peft", tmp_path / "back", "per-expert")
    assert_same_tensors(source, tmp_path / "back")
    base = QWEN3.build(mlp_only_layers=[0])
    want = add_to_weights(copy.deepcopy(base).double(), source).state_dict()
    got = PeftModel.from_pretrained(base, tmp_path / "peft").merge_and_unload().state_dict()
    for name, weight in want.items():
        assert_close(name, weight, got[name], 1e-6)


def test_stock_peft_converts_a_plain_v4_adapter_to_the_same_weights(tmp_path):
    source = V4Adapter(**MODEL, config={"lora_dropout": 0}).save(tmp_path / "v4")
    convert_adapter(source, tmp_path / "peft", "peft")
    ours, theirs = (
        PeftModel.from_pretrained(QWEN3.build(), folder).state_dict() for folder in (tmp_path / "peft", source)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours if "lora_" in key)


@pytest.mark.parametrize(
    "parameters",
    [
        ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
        ("gate_up_proj",),
        ("mlp.experts.down_proj",),
        ("0.mlp.experts.gate_up_proj", "0.mlp.experts.down_proj", "1.mlp.experts.gate_up_proj"),
        ("0.mlp.experts.gate_up_proj", "0.mlp.experts.down_proj", "1.mlp.experts.down_proj"),
    ],
)
def test_an_adapter_that_stock_peft_saved_comes_back_bit_equal(tmp_path, parameters):
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["q_proj", "o_proj"],
        target_parameters=["gate.weight", *parameters],
        rank_pattern={"mlp.experts.gate_up_proj": 6, "mlp.experts.down_proj": 2, "gate.weight": 1},
        alpha_pattern={"gate_up_proj": 1},
        init_lora_weights=False,
    )
    get_peft_model(QWEN3.build(), config).save_pretrained(tmp_path / "stock")
    for to in ("per-expert", "fused-2025", "peft"):
        convert_adapter(tmp_path / "stock", tmp_path / to, to, check=True)
        convert_adapter(tmp_path / to, tmp_path / f"{to} back", "peft", check=True)
        assert_same_tensors(tmp_path / "stock", tmp_path / f"{to} back")
        assert_same_additions(tmp_path / "stock", tmp_path / to)
        assert_same_additions(tmp_path / "stock", tmp_path / f"{to} back")
        PeftModel.from_pretrained(QWEN3.build(), tmp_path / f"{to} back")
    _, v4 = load(tmp_path / "per-expert")
    of_experts = {"gate_up_proj": {"gate_proj", "up_proj"}, "down_proj": {"down_proj"}}
    leaves = {name.rpartition(".")[2] for name in v4["target_modules"]}
    adapted = (of_experts[name.rpartition(".")[2]] for name in parameters)
    assert leaves == {"q_proj", "o_proj", "gate"}.union(*adapted)


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("projections", [EXPERT_PROJECTIONS, ("gate_proj", "up_proj"), ("down_proj",)])
def test_adapters_of_peft_up_to_0_18_are_recognised_by_their_sizes_and_put_right(tmp_path, projections, attention):
    adapter = V4Adapter(projections=projections)
    source = adapter.save(tmp_path / "v4")
    convert_adapter(source, tmp_path / "peft", "peft")
    tensors, config = load(tmp_path / "peft")
    swapped = dict(tensors) if attention else {key: tensor for key, tensor in tensors.items() if "q_proj" not in key}
    for key in swapped:
        if ".experts." in key and "lora_A" in key:
            key_b, r = key.replace("lora_A", "lora_B"), 4 if projections == ("down_proj",) else 8
            r = 4 if ".base_layer." not in key and len(projections) != 2 else r
            A, B = tensors[key].unflatten(0, (-1, r)), tensors[key_b].unflatten(1, (r, -1))
            # W (E, x, y) was taken for (E, in, out): W[e] = A[e]^T @ B[e]^T, with x = A's width and y = B's height.
            swapped[key] = B.permute(2, 1, 0).flatten(0, 1)
            swapped[key_b] = A.permute(2, 1, 0).flatten(1, 2)
    del config["peft_version"]
    old = save(tmp_path / "old", swapped, config)
    if not attention and len(projections) != 3:
        with pytest.raises(ValueError, match='which "peft_version" wrote the adapter'):
            convert_adapter(old, tmp_path / "refused", "per-expert")
        old = save(tmp_path / "old with version", swapped, {**config, "peft_version": "0.18.1"})
    convert_adapter(old, tmp_path / "back", "per-expert", check=True)
    want, got = load(source)[0], load(tmp_path / "back")[0]
    assert all(torch.equal(got[key], tensor) for key, tensor in want.items() if attention or "q_proj" not in key)


@pytest.mark.parametrize("first", ADAPTER_FORMATS)
def test_an_adapter_that_peft_0_18_saved_gives_the_logits_that_peft_0_18_computed(tmp_path, first):
    convert_adapter(peft_0_18.ADAPTER, tmp_path / "first", first, check=True)
    convert_adapter(tmp_path / "first", tmp_path / "peft", "peft", check=True)
    want, base = load_file(peft_0_18.LOGITS), peft_0_18.base_model()
    assert (base(want["input_ids"]).logits - want["logits"]).norm() > 0.1 * want["logits"].norm()
    got = PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    assert_close("logits", want["logits"], got(want["input_ids"]).logits, 1e-5)


@cases({**ONE_SCALING, **TWO_SCALINGS})
@pytest.mark.parametrize("to", ADAPTER_FORMATS)
def test_uniform_says_everything_in_r_and_lora_alpha(tmp_path, adapter, to):
    source = adapter.save(tmp_path / "v4")
    convert_adapter(source, tmp_path / "uniform", to, uniform=True, check=True)
    tensors, config = load(tmp_path / "uniform")
    assert config["lora_alpha"] == config["r"] and not config["use_rslora"]
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    if to == "per-expert":
        assert {len(tensor) for key, tensor in tensors.items() if "lora_A" in key} == {config["r"]}
    if adapter.projections != ("gate_proj",):
        assert_same_additions(source, tmp_path / "uniform", 1e-6)


def test_a_power_of_two_is_multiplied_into_b_without_another_dtype(tmp_path):
    source = V4Adapter(r=4, alpha=8, dtype=torch.bfloat16).save(tmp_path / "v4")
    convert_adapter(source, tmp_path / "uniform", "per-expert", uniform=True)
    assert {tensor.dtype for tensor in load(tmp_path / "uniform")[0].values()} == {torch.bfloat16}
    assert_same_additions(source, tmp_path / "uniform", 0.0)


def test_other_tensors_and_files_are_passed_on(tmp_path):
    rest = {"base_model.model.lm_head.weight": torch.randn(11, 7), "base_model.model.score.bias": torch.arange(3)}
    source = save(
        tmp_path / "v4", {**PLAIN.tensors(), **rest}, {**PLAIN.adapter_config(), "modules_to_save": ["lm_head"]}
    )
    (source / "tokenizer.json").write_text("{}")
    (source / "optimizer.pt").write_bytes(b"not copied")
    convert_adapter(source, tmp_path / "peft", "peft", check=True)
    tensors, config = load(tmp_path / "peft")
    assert all(torch.equal(tensors[key], tensor) for key, tensor in rest.items())
    assert config["modules_to_save"] == ["lm_head"]
    assert sorted(path.name for path in (tmp_path / "peft").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
    ]


def test_the_command_line_converts_and_checks(tmp_path):
    source = PLAIN.save(tmp_path / "v4")
    command = [
        sys.executable,
        "-m",
        "qwen3_moe_integration",
        "convert",
        source,
        tmp_path / "peft",
        "--to",
        "peft",
        "--check",
    ]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT / "integration")
    assert done.returncode == 0, done.stderr
    assert_same_additions(source, tmp_path / "peft")
