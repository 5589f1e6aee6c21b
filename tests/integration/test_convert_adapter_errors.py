"""What the converter refuses of an adapter, and that it leaves nothing half-done: by name, the source untouched."""

import hashlib
import json
import re

import pytest
import torch
from safetensors.torch import save_file

from qwen3_moe_integration.convert import ADAPTER_FORMATS, convert_adapter, folder
from tests.integration.adapters import V4Adapter, load, save

V4 = V4Adapter()
A_OF_EXPERT = "base_model.model.model.layers.1.mlp.experts.2.up_proj.lora_A.weight"
B_OF_EXPERT = A_OF_EXPERT.replace("lora_A", "lora_B")


def without(tensors, *keys):
    return {key: tensor for key, tensor in tensors.items() if key not in keys}


def with_nan(tensor):
    return tensor.index_fill(0, torch.tensor([0]), float("nan"))


BROKEN = {
    "a missing expert": (lambda t: without(t, A_OF_EXPERT, B_OF_EXPERT), r"layers\.1.*up_proj.*\[2\] are missing"),
    "an expert more in one layer": (
        lambda t: {**t, **{key.replace(".2.", ".3."): t[key].clone() for key in (A_OF_EXPERT, B_OF_EXPERT)}},
        r"has 4 experts, but \[3\] are missing",
    ),
    "A without B": (
        lambda t: {k: v for k, v in t.items() if "0.mlp" not in k or "down_proj.lora_B" not in k},
        "no lora_B",
    ),
    "A of a linear layer without B": (
        lambda t: {k: v for k, v in t.items() if "q_proj.lora_B" not in k},
        "q_proj has a lora_A but no lora_B",
    ),
    "one B missing": (lambda t: without(t, B_OF_EXPERT), r"up_proj\.lora_B.*\[2\] are missing"),
    "another width in one expert": (lambda t: {**t, A_OF_EXPERT: torch.randn(4, 6)}, "one shape and dtype"),
    "another dtype in one expert": (lambda t: {**t, A_OF_EXPERT: t[A_OF_EXPERT].half()}, "one shape and dtype"),
    "another width in one layer": (
        lambda t: {k: torch.randn(4, 6) if "1.mlp" in k and "up_proj.lora_A" in k else v for k, v in t.items()},
        r"layers\.1\.mlp\.up_proj has hidden size 6, but .* has 7",
    ),
    "another rank than configured": (
        lambda t: {k: torch.randn(3, 7) if "q_proj.lora_A" in k else v for k, v in t.items()},
        r"q_proj: lora_A must be",
    ),
    "NaN in an expert": (
        lambda t: {**t, A_OF_EXPERT: with_nan(t[A_OF_EXPERT])},
        f"{re.escape(A_OF_EXPERT)}.*not finite",
    ),
    "no experts": (lambda t: {k: v for k, v in t.items() if ".experts." not in k}, "found none"),
    "two layouts": (
        lambda t: {**t, "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.randn(3, 4, 7)},
        r"found \['per-expert', 'fused-2025'\]",
    ),
    "a vector of DoRA": (
        lambda t: {**t, A_OF_EXPERT.replace("lora_A.weight", "lora_magnitude_vector"): torch.randn(5)},
        "lora_magnitude_vector is no factor",
    ),
}


@pytest.mark.parametrize("change, message", BROKEN.values(), ids=BROKEN.keys())
@pytest.mark.parametrize("to", ADAPTER_FORMATS)
def test_a_broken_adapter_is_refused_by_name(tmp_path, change, message, to):
    source = save(tmp_path / "broken", change(V4.tensors()), V4.adapter_config())
    with pytest.raises(ValueError, match=message):
        convert_adapter(source, tmp_path / "out", to)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"peft_type": "IA3"}, "peft_type \"LORA\", got 'IA3'"),
        ({"use_dora": True}, "use_dora must be false"),
        ({"lora_bias": True}, "lora_bias must be false"),
        ({"use_qalora": True}, "use_qalora must be false"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out must be false"),
        ({"alpha_pattern": {"1.up_proj": 3}}, r"experts\.\*\.up_proj must have one alpha for all experts"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4.*base weights"),
        ({"r": 3}, r"0\.down_proj: adapter_config.json gives it rank 3, but lora_A is \(3, 4, 5\)"),
        ({"r": None}, "r must be a positive number, got None"),
        ({"rank_pattern": {"up_proj": 0}}, "r must be a positive number, got 0 for up_proj"),
        ({"alpha_pattern": {"(": 1}}, "no regular expression"),
    ],
)
def test_a_configuration_of_something_else_is_refused(tmp_path, fields, message):
    source = save(tmp_path / "v4", V4.tensors(), {**V4.adapter_config(), **fields})
    with pytest.raises(ValueError, match=message):
        convert_adapter(source, tmp_path / "out", "peft")


@pytest.mark.parametrize("to", ADAPTER_FORMATS)
def test_factors_of_peft_that_fit_no_model_are_refused(tmp_path, to):
    convert_adapter(V4.save(tmp_path / "v4"), tmp_path / "peft", "peft")
    tensors, config = load(tmp_path / "peft")
    key = "base_model.model.model.layers.0.mlp.experts.lora_{}.weight"
    for changed, message in (
        ({key.format("A"): torch.randn(12, 6)}, r"factors must be \(H, 2I\)"),
        ({key.format("A"): torch.randn(11, 5)}, r"\(r\*E, in\)"),
        ({key.format("A"): torch.randn(16, 5), key.format("B"): torch.randn(7, 16)}, "has experts 4, but"),
    ):
        source = save(tmp_path / f"broken {len(changed[key.format('A')])}", {**tensors, **changed}, config)
        with pytest.raises(ValueError, match=message):
            convert_adapter(source, tmp_path / "out", to)


def test_an_odd_number_of_rows_of_gate_up_proj_is_refused(tmp_path):
    convert_adapter(V4Adapter(projections=("gate_proj", "up_proj")).save(tmp_path / "v4"), tmp_path / "peft", "peft")
    tensors, config = load(tmp_path / "peft")
    key = "base_model.model.model.layers.1.mlp.experts.lora_B.weight"
    source = save(tmp_path / "odd", {**tensors, key: tensors[key][:-1]}, config)
    with pytest.raises(ValueError, match=r"lora_B of gate_up_proj must have an even number of rows, got \(3, 9, 8\)"):
        convert_adapter(source, tmp_path / "out", "per-expert")


def test_pickled_weights_are_refused_by_name(tmp_path):
    (tmp_path / "v4").mkdir()
    (tmp_path / "v4" / "adapter_config.json").write_text(json.dumps(V4.adapter_config()))
    torch.save(V4.tensors(), tmp_path / "v4" / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model\.bin.*pickles can run code"):
        convert_adapter(tmp_path / "v4", tmp_path / "out", "peft")


def test_truncated_weights_and_broken_json_are_named(tmp_path):
    source = V4.save(tmp_path / "v4")
    config, weights = source / "adapter_config.json", source / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is no readable safetensors"):
        convert_adapter(source, tmp_path / "out", "peft")
    weights.write_bytes(whole)
    config.write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config\.json is no JSON"):
        convert_adapter(source, tmp_path / "out", "peft")
    config.unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        convert_adapter(source, tmp_path / "out", "peft")


def contents(path):
    return {each.name: hashlib.sha256(each.read_bytes()).hexdigest() for each in path.iterdir()}


@pytest.mark.parametrize("writer", ["write_tensors", "write_json", "copy_companions", "_to_disk"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "killed"])
def test_work_that_ends_early_leaves_the_source_and_no_target(tmp_path, monkeypatch, writer, error):
    source = V4.save(tmp_path / "v4")
    before = contents(source)
    write = getattr(folder, writer)

    def write_and_fail(*arguments):
        write(*arguments)
        assert not (tmp_path / "out").exists()
        raise error

    monkeypatch.setattr(folder, writer, write_and_fail)
    with pytest.raises(type(error)):
        convert_adapter(source, tmp_path / "out", "peft")
    assert contents(source) == before
    assert [path.name for path in tmp_path.iterdir()] == ["v4"]


def test_a_target_that_exists_or_lies_in_the_source_is_refused(tmp_path):
    source = V4.save(tmp_path / "v4")
    before = contents(source)
    for target in (source, tmp_path / "file", tmp_path / "link"):
        if target.name == "file":
            target.write_text("kept")
        if target.name == "link":
            target.symlink_to(tmp_path / "nowhere")
        with pytest.raises(FileExistsError, match=target.name):
            convert_adapter(source, target, "peft")
    with pytest.raises(ValueError, match="must not be inside"):
        convert_adapter(source, source / "out", "peft")
    assert contents(source) == before and (tmp_path / "file").read_text() == "kept"


def test_a_target_that_somebody_makes_meanwhile_is_kept(tmp_path, monkeypatch):
    source, copy = V4.save(tmp_path / "v4"), folder.copy_companions

    def copy_and_be_overtaken(*arguments):
        copy(*arguments)
        (tmp_path / "out").mkdir()

    monkeypatch.setattr(folder, "copy_companions", copy_and_be_overtaken)
    with pytest.raises(FileExistsError, match="out has been made by somebody else meanwhile"):
        convert_adapter(source, tmp_path / "out", "peft")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "v4"]
    assert not [*(tmp_path / "out").iterdir()]


LM_HEAD = "base_model.model.lm_head.weight"
B_OF_ATTENTION = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
DIFFERENCES = {
    "an expert": (
        lambda t: {**t, B_OF_EXPERT: t[B_OF_EXPERT] * (1 + 1e-4)},
        r"layers\.1\.mlp\.up_proj.*adds something else, relative difference 1\.0e-04",
    ),
    "a linear layer": (
        lambda t: {**t, B_OF_ATTENTION: t[B_OF_ATTENTION] * (1 + 1e-4)},
        r"layers\.0\.self_attn\.q_proj.*adds something else, relative difference 1\.0e-04",
    ),
    "a linear layer without an adapter": (
        lambda t: without(t, B_OF_ATTENTION, B_OF_ATTENTION.replace("lora_B", "lora_A")),
        r"layers\.0\.self_attn\.q_proj.*adds something else, relative difference inf",
    ),
    "a layer trained as a whole": (lambda t: {**t, LM_HEAD: t[LM_HEAD] + 1e-6}, f"{LM_HEAD} is not what it was"),
    "a dropped key": (lambda t: without(t, LM_HEAD), rf"other tensors: \['{LM_HEAD}'\]"),
}


@pytest.mark.parametrize("spoil, message", DIFFERENCES.values(), ids=DIFFERENCES.keys())
def test_check_finds_one_difference(tmp_path, monkeypatch, spoil, message):
    source = save(tmp_path / "v4", {**V4.tensors(), LM_HEAD: torch.randn(11, 7)}, V4.adapter_config())
    convert_adapter(source, tmp_path / "right", "per-expert", check=True)
    monkeypatch.setattr(folder, "write_tensors", lambda path, tensors, _: save_file(spoil(tensors), path))
    with pytest.raises(ValueError, match=message):
        convert_adapter(source, tmp_path / "out", "per-expert", check=True)
    assert not (tmp_path / "out").exists()
    convert_adapter(source, tmp_path / "out", "per-expert")
