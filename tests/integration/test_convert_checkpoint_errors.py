"""What the converter refuses of a checkpoint, that it leaves nothing half-done, and what ``--check`` finds."""

import json
import re
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen3_moe_integration.__main__ import main
from qwen3_moe_integration.convert import convert_checkpoint, folder, shards
from tests import programs
from tests.conftest import ROOT
from tests.integration.checkpoints import (
    BLOCK,
    assert_same_bits,
    by_expert,
    in_4_bit,
    load,
    others,
    random_experts,
    save,
)

BROKEN = {
    "a missing expert": (lambda t: {k: v for k, v in t.items() if "10.mlp.experts.1.up" not in k}, r"up_proj of \[1\]"),
    "an expert of another size": (
        lambda t: {k: v[:-1].clone() if "10.mlp.experts.1.up" in k else v for k, v in t.items()},
        r"experts\.1\.up_proj\.weight is \(\d+, \d+\), which does not fit",
    ),
    "NaN": (lambda t: {k: v * float("nan") if "1.up" in k else v for k, v in t.items()}, "up_proj.* not finite"),
    "NaN beside experts": (
        lambda t: {k: v.index_fill(0, torch.tensor(16), float("nan")) if "embed" in k else v for k, v in t.items()},
        "embed_tokens.weight has values that are not finite",
    ),
    "two dtypes": (lambda t: {k: v.half() if "1.up" in k else v for k, v in t.items()}, "one dtype"),
    "fp8": (
        lambda t: {k: v.to(torch.float8_e4m3fn) if ".experts." in k else v for k, v in t.items()},
        "gate_up_proj: experts in F8_E4M3 are not supported",
    ),
    "an odd number of rows": (
        lambda t: {f"{BLOCK.format(0)}.experts.gate_up_proj": torch.randn(3, 5, 8)},
        r"gate_up_proj must have an even number of rows, gate's and up's, got \(3, 5, 8\)",
    ),
    "another quantization": (
        lambda t: {**t, f"{BLOCK.format(0)}.experts.0.up_proj.weight_scale_inv": torch.ones(1)},
        "weight_scale_inv is neither",
    ),
    "no experts": (lambda t: others(), "found none"),
    "two layouts": (
        lambda t: {**t, f"{BLOCK.format(0)}.experts.down_proj": torch.randn(3, 2, 2)},
        "per-expert', 'stacked'",
    ),
}


@pytest.mark.parametrize("change, message", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_checkpoint_is_refused_by_name(tmp_path, change, message):
    save(tmp_path / "v4", change({**random_experts(), **others()}))
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / "v4", tmp_path / "out", "stacked")
    assert [path.name for path in tmp_path.iterdir()] == ["v4"]


OTHER_MODELS = {
    "one expert more": ({"num_experts": 4}, "num_experts 4, but the checkpoint has 3 experts"),
    "one expert less, by another name": ({"num_local_experts": 2}, "num_local_experts 2, but .* 3 experts"),
    "experts of the language model": ({"text_config": {"num_experts": 4}}, "num_experts 4"),
    "a layer more": ({"num_hidden_layers": 4}, r"num_hidden_layers 4, but of layers \[3\] .* nothing"),
    "layers of the language model": ({"text_config": {"num_hidden_layers": 5}}, r"layers \[3, 4\]"),
}


@pytest.mark.parametrize("config, message", OTHER_MODELS.values(), ids=OTHER_MODELS.keys())
def test_a_checkpoint_of_another_model_than_its_configuration_is_refused(tmp_path, config, message):
    """It has experts in layers 0 and 2, and a dense layer 1; the image tower's layers do not count."""
    tower = {f"visual.layers.{l}.weight": torch.ones(1) for l in range(6)}
    save(tmp_path / "v4", {**random_experts(layers=(0, 2)), **others(), **tower}, config=config)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / "v4", tmp_path / "out", "stacked")
    assert [path.name for path in tmp_path.iterdir()] == ["v4"]


def test_layers_beside_those_of_the_configuration_are_converted(tmp_path):
    """Those for multi-token prediction come after the others, or in a list of their own."""
    want = random_experts(layers=(0, 1, 2))
    want.update({key.replace("model.layers.2", "mtp.layers.0"): tensor.clone() for key, tensor in want.items()})
    save(tmp_path / "v4", want, config={"num_experts": 3, "num_hidden_layers": 2})
    convert_checkpoint(tmp_path / "v4", tmp_path / "out", "stacked", check=True)
    assert_same_bits(want, by_expert(load(tmp_path / "out")))


BROKEN_4_BIT = {
    "a missing statistic": (
        lambda t: {k: v for k, v in t.items() if "1.up_proj.weight.absmax" not in k},
        "its absmax is missing",
    ),
    "a missing weight": (
        lambda t: {k: v for k, v in t.items() if not k.endswith("0.mlp.experts.1.up_proj.weight")},
        "is missing",
    ),
    "too few scales": (
        lambda t: {k: v[1:].clone() if k.endswith("1.up_proj.weight.absmax") else v for k, v in t.items()},
        r"1\.up_proj\.weight\.absmax must have \d+ bytes",
    ),
    "another codebook": (
        lambda t: {k: v * 2 if k.endswith("1.up_proj.weight.quant_map") else v for k, v in t.items()},
        "one quant_map",
    ),
    "no state": (
        lambda t: {k: v[:5].clone() if "1.up_proj.weight.quant_state" in k else v for k, v in t.items()},
        "no quantization state",
    ),
}


@pytest.mark.parametrize("change, message", BROKEN_4_BIT.values(), ids=BROKEN_4_BIT.keys())
def test_a_broken_4_bit_checkpoint_is_refused_by_name(tmp_path, change, message):
    save(tmp_path / "v4", change(in_4_bit(random_experts(H=64))))
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / "v4", tmp_path / "out", "stacked")


@pytest.mark.parametrize(
    "nested, to, named",
    [
        (False, "stacked", r"gate_up_proj\.absmax"),
        (True, "stacked", r"gate_up_proj\.absmax"),  # decoded
        (True, "per-expert", r"1\.up_proj\.weight\.nested_absmax"),  # passed on
    ],
)
def test_4_bit_scales_that_are_not_finite_are_refused_by_name(tmp_path, nested, to, named):
    tensors = in_4_bit(random_experts(H=64), nested=nested)
    tensors[f"{BLOCK.format(10)}.experts.1.up_proj.weight.{'nested_' * nested}absmax"][-1] = float("nan")
    save(tmp_path / "v4", tensors)
    with pytest.raises(ValueError, match=f"10.*{named} has values that are not finite"):
        convert_checkpoint(tmp_path / "v4", tmp_path / "out", to)


def test_matrices_that_end_within_a_block_are_refused(tmp_path):
    save(tmp_path / "v4", in_4_bit(random_experts(H=32, I=3)))
    with pytest.raises(ValueError, match="a matrix of 96 values is not whole blocks of 64"):
        convert_checkpoint(tmp_path / "v4", tmp_path / "out", "stacked")


@pytest.mark.parametrize("name", ["../v4/model.safetensors", "/etc/passwd", "a/b.safetensors", "weights.bin", 7])
def test_names_of_other_places_in_an_index_are_refused(tmp_path, name):
    path = save(tmp_path / "v4", random_experts(), files=2)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = name
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="no safetensors file in the same folder"):
        convert_checkpoint(path, tmp_path / "out", "stacked")


def test_an_index_that_disagrees_with_its_files_and_damaged_files_are_named(tmp_path):
    path = save(tmp_path / "v4", random_experts(), files=2)
    first, second = sorted(path.glob("*.safetensors"))
    whole = second.read_bytes()
    second.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=f"{second.name} is no readable safetensors file"):
        convert_checkpoint(path, tmp_path / "out", "stacked")
    second.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match="is in two files"):
        convert_checkpoint(path, tmp_path / "out", "stacked")
    save_file({"something.else": torch.ones(1)}, second)
    with pytest.raises(ValueError, match=f"in {second.name}, but it is in None"):
        convert_checkpoint(path, tmp_path / "out", "stacked")
    second.unlink()
    with pytest.raises(FileNotFoundError, match=second.name):
        convert_checkpoint(path, tmp_path / "out", "stacked")
    second.with_suffix(".bin").write_bytes(b"a pickle")
    with pytest.raises(ValueError, match=r"00002\.bin.*pickles can run code"):
        convert_checkpoint(path, tmp_path / "out", "stacked")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "killed"])
def test_work_that_ends_between_two_files_leaves_the_source_and_no_target(tmp_path, monkeypatch, error):
    want = {**random_experts(), **others()}
    save(tmp_path / "v4", want, files=3)
    write, written = shards._write, []

    def write_and_fail(path, *arguments):
        if written:
            raise error
        write(path, *arguments)
        written.append(path)
        assert not (tmp_path / "out").exists()

    monkeypatch.setattr(shards, "_write", write_and_fail)
    with pytest.raises(type(error)):
        convert_checkpoint(tmp_path / "v4", tmp_path / "out", "stacked")
    assert written
    assert [path.name for path in tmp_path.iterdir()] == ["v4"]
    assert_same_bits(want, load(tmp_path / "v4"))


@pytest.mark.parametrize(
    "event, path",
    [("open", ".unfinished/model-00002"), ("open", ".unfinished/tokenizer.json"), ("os.rename", ".unfinished")],
    ids=["between weights", "after weights", "before the end"],
)
def test_a_killed_process_leaves_the_source_and_no_target_and_can_be_repeated(tmp_path, tmp_path_factory, event, path):
    """By SIGKILL, at what the interpreter reports to its audit hooks just before it does it."""
    script = tmp_path_factory.mktemp("script") / "script.py"
    script.write_text("""
import os, runpy, signal, sys

event, path = sys.argv.pop(1), sys.argv.pop(1)

def kill(name, arguments):
    if name == event and path in str(arguments[0]):
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(kill)
runpy.run_module("qwen3_moe_integration", run_name="__main__")
""")
    want = {**random_experts(), **others()}
    arguments = [str(save(tmp_path / "v4", want, files=3)), str(tmp_path / "out"), "--to", "stacked", "--check"]
    variables = {"PYTHONPATH": str(ROOT / "integration")}
    run = programs.run(script, event, path, "convert", *arguments, variables=variables)
    assert run.returncode == -signal.SIGKILL, run.stderr
    unfinished, _ = sorted(path.name for path in tmp_path.iterdir())
    assert re.fullmatch(r"\.out\.[0-9a-f]{8}\.unfinished", unfinished)
    assert_same_bits(want, load(tmp_path / "v4"))
    assert main(["convert", *arguments]) == 0
    assert_same_bits(want, by_expert(load(tmp_path / "out")))


def with_one_bit_flipped(tensors, key):
    tensors[key].flatten().view(torch.uint8)[0] ^= 1


def with_another_dtype(tensors, key):
    text = bytes(tensors[key].tolist()).replace(b"bfloat16", b"float16")
    tensors[key] = torch.tensor([*text], dtype=torch.uint8)


def without(tensors, beginning):
    for key in [key for key in tensors if key.startswith(beginning)]:
        del tensors[key]


STACK = f"{BLOCK.format(10)}.experts.down_proj"
DIFFERENCES = {
    "an expert": (with_one_bit_flipped, STACK, r"10\.mlp\.down_proj\.0 is not what it was"),
    "a scale": (with_one_bit_flipped, f"{STACK}.absmax", r"10\.mlp\.down_proj\.0 is not what it was"),
    "a codebook": (with_one_bit_flipped, f"{STACK}.quant_map", r"10\.mlp\.down_proj\.0 is not what it was"),
    "the dtype": (with_another_dtype, f"{STACK}.quant_state.bitsandbytes__nf4", r"10\.mlp\.down_proj\.0 is not what"),
    "an embedding": (with_one_bit_flipped, "model.embed_tokens.weight", r"embed_tokens\.weight is not what it was"),
    "a dropped key": (without, "a.buffer", "has other tensors"),
    "a dropped block": (without, BLOCK.format(10), "has other tensors"),
}


@pytest.mark.parametrize("spoil, key, message", DIFFERENCES.values(), ids=DIFFERENCES.keys())
def test_check_finds_one_wrong_bit(tmp_path, monkeypatch, spoil, key, message):
    save(tmp_path / "v4", {**in_4_bit(random_experts(H=64)), **others()})
    copy = folder.copy_companions

    def spoil_and_copy(source, target, **options):
        tensors = load_file(target / "model.safetensors")
        spoil(tensors, key)
        save_file(tensors, target / "model.safetensors")
        copy(source, target, **options)

    convert_checkpoint(tmp_path / "v4", tmp_path / "right", "stacked", check=True)
    monkeypatch.setattr(folder, "copy_companions", spoil_and_copy)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / "v4", tmp_path / "out", "stacked", check=True)
    assert not (tmp_path / "out").exists()
