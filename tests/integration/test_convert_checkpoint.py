"""Checkpoints between layouts: dense and 4-bit weights keep their bits, in memory that does not grow with the model."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections import defaultdict

import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qwen3_moe_integration.__main__ import main
from qwen3_moe_integration.convert import CHECKPOINT_FORMATS, convert, convert_checkpoint, folder, shards
from tests.conftest import ROOT
from tests.integration.models import QWEN3, tokens

BLOCK = "model.layers.{}.mlp"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
STATISTICS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state")


def random_experts(H=32, I=24, E=3, layers=(0, 10), dtype=torch.bfloat16):
    sizes = {"gate_proj": (I, H), "up_proj": (I, H), "down_proj": (H, I)}
    return {
        f"{BLOCK.format(l)}.experts.{e}.{p}.weight": torch.randn(sizes[p]).to(dtype)
        for l in layers
        for e in range(E)
        for p in PROJECTIONS
    }


def others(H=32):
    return {
        "model.embed_tokens.weight": torch.randn(17, H).bfloat16(),
        "model.layers.0.mlp.gate.weight": torch.randn(3, H),
        "model.layers.1.mlp.gate_proj.weight": torch.randn(5, H),  # a layer without experts
        "a.buffer": torch.arange(7, dtype=torch.int16),
        "a.scalar": torch.tensor(2.5),
    }


def in_4_bit(tensors, blocksize=64, nested=True, quant_type="nf4"):
    """As Transformers 4 with bitsandbytes saves experts: each matrix quantized alone."""
    packed = {}
    for key, tensor in tensors.items():
        data, state = quantize_4bit(tensor, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type)
        packed[key] = data
        packed.update({f"{key}.{name}": x.contiguous() for name, x in state.as_dict(packed=True).items()})
    return packed


def save(path, tensors, files=1, config=None):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config or {"model_type": "qwen3_moe"}))
    (path / "tokenizer.json").write_text("{}")
    if files == 1:
        save_file(tensors, path / "model.safetensors")
        return path
    index = {key: f"model-{i % files + 1:05d}-of-{files:05d}.safetensors" for i, key in enumerate(tensors)}
    for name in set(index.values()):
        save_file({key: tensors[key] for key in index if index[key] == name}, path / name)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return path


def load(path):
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors = load_file(file)
        assert not found.keys() & tensors.keys()
        found.update(tensors)
    index = path / "model.safetensors.index.json"
    if index.exists():
        assert json.loads(index.read_text())["weight_map"].keys() == found.keys()
    return found


def decoded(tensors):
    """Every 4-bit weight as bitsandbytes decodes it, the rest as it is."""
    found = {}
    for key, tensor in tensors.items():
        if any(f".{name}" in key for name in STATISTICS):
            continue
        beside = {name.removeprefix(f"{key}."): x for name, x in tensors.items() if name.startswith(f"{key}.")}
        found[key] = _decode(tensor, QuantState.from_dict(beside, "cpu")) if beside else tensor
    return found


def _decode(packed, state):
    # As one row: on a CPU bitsandbytes 0.50.2 decodes wrongly what has blocks that do not end with a row.
    shape, state.shape = state.shape, torch.Size([state.shape.numel()])
    return dequantize_4bit(packed, state).view(shape)


def by_expert(tensors):
    """The weights by the names they have in Transformers 4."""
    found = {}
    for key, tensor in tensors.items():
        block, _, name = key.removesuffix(".weight").rpartition(".")
        if tensor.dim() != 3:
            found[key] = tensor
        elif name == "gate_up_proj":
            for e, (gate, up) in enumerate(tensor.unflatten(1, (2, -1))):
                found[f"{block}.{e}.gate_proj.weight"], found[f"{block}.{e}.up_proj.weight"] = gate, up
        else:
            block = block if block.endswith(".experts") else f"{block}.experts"
            found.update({f"{block}.{e}.{name}.weight": matrix for e, matrix in enumerate(tensor)})
    return found


def stacked(tensors):
    """The weights of experts by the names they have in Transformers 5."""
    stacks = defaultdict(list)
    for key, tensor in tensors.items():
        owner, _, name = key.removesuffix(".weight").rsplit(".", 2)
        stacks[owner, name].append(tensor)
    found = {}
    for (owner, name), matrices in stacks.items():
        if name == "down_proj":
            found[f"{owner}.down_proj"] = torch.stack(matrices)
        elif name == "gate_proj":
            both = zip(matrices, stacks[owner, "up_proj"])
            found[f"{owner}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in both])
    return found


def assert_same_bits(want, got):
    assert want.keys() == got.keys()
    for key, tensor in want.items():
        assert got[key].dtype == tensor.dtype and torch.equal(got[key], tensor), key


@pytest.mark.parametrize("first, second", itertools.product(CHECKPOINT_FORMATS, repeat=2))
@pytest.mark.parametrize("files", [1, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_dense_weights_keep_their_bits_through_every_pair(tmp_path, first, second, files, dtype):
    want = {**random_experts(H=5, I=3, dtype=dtype), **others(H=5)}
    save(tmp_path / "v4", want, files)
    convert_checkpoint(tmp_path / "v4", tmp_path / "first", first, check=True)
    convert_checkpoint(tmp_path / "first", tmp_path / "second", second, check=True)
    convert_checkpoint(tmp_path / "second", tmp_path / "back", "per-expert", check=True)
    assert_same_bits(want, by_expert(load(tmp_path / "second")))
    assert_same_bits(want, load(tmp_path / "back"))
    assert len(list((tmp_path / "second").glob("*.safetensors"))) > 1 or files == 1
    assert (tmp_path / "second" / "tokenizer.json").read_text() == "{}"


KINDS = {
    "nested": {"nested": True},
    "flat": {"nested": False},
    "fp4, other blocks": {"quant_type": "fp4", "blocksize": 128},
}


@pytest.mark.parametrize("first, second", itertools.product(CHECKPOINT_FORMATS, repeat=2))
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_4_bit_weights_decode_to_the_same_bits_through_every_pair(tmp_path, first, second, kind):
    want = {**in_4_bit(random_experts(H=64, I=24), **kind), **others()}
    save(tmp_path / "v4", want, files=3)
    convert_checkpoint(tmp_path / "v4", tmp_path / "first", first, check=True)
    convert_checkpoint(tmp_path / "first", tmp_path / "second", second, check=True)
    convert_checkpoint(tmp_path / "second", tmp_path / "back", "per-expert", check=True)
    assert_same_bits(decoded(want), by_expert(decoded(load(tmp_path / "second"))))
    back = load(tmp_path / "back")
    assert_same_bits(decoded(want), decoded(back))
    if not kind.get("nested", True):
        assert_same_bits(want, back)


def test_scales_that_were_quantized_as_one_stay_quantized_when_groups_fit(tmp_path):
    """H*I / 64 = 256 scales a matrix: one group of nested scales."""
    E, I, H = 3, 128, 128
    stacks = {"gate_up_proj": torch.randn(E, 2 * I, H), "down_proj": torch.randn(E, H, I)}
    stacks = {f"{BLOCK.format(0)}.experts.{name}": stack.bfloat16() for name, stack in stacks.items()}
    want = in_4_bit(stacks)
    save(tmp_path / "stacked", want)
    for to in ("per-expert", "fused-2025"):
        convert_checkpoint(tmp_path / "stacked", tmp_path / to, to, check=True)
        tensors = load(tmp_path / to)
        assert any("nested_absmax" in key for key in tensors)
        assert_same_bits(by_expert(decoded(want)), by_expert(decoded(tensors)))
        convert_checkpoint(tmp_path / to, tmp_path / f"{to} back", "stacked", check=True)
        assert_same_bits(want, load(tmp_path / f"{to} back"))


def test_the_configuration_names_the_quantizer_that_reads_the_layout(tmp_path):
    stock = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config = {"model_type": "qwen3_moe", "quantization_config": stock}
    save(tmp_path / "v4", in_4_bit(random_experts(H=64)), config=config)
    convert_checkpoint(tmp_path / "v4", tmp_path / "stacked", "stacked")
    stacked = json.loads((tmp_path / "stacked" / "config.json").read_text())["quantization_config"]
    assert stacked == {"quant_method": "bitsandbytes_moe", "bnb_4bit_quant_type": "nf4", "experts_blocksize": 64}
    convert_checkpoint(tmp_path / "stacked", tmp_path / "back", "per-expert")
    back = json.loads((tmp_path / "back" / "config.json").read_text())["quantization_config"]
    assert back == {**stock, "load_in_8bit": False}


def test_transformers_loads_what_it_saved_after_a_way_through_every_layout(tmp_path):
    model = QWEN3.build().eval()
    model.save_pretrained(tmp_path / "v4", max_shard_size="50KB")
    input_ids, path = tokens(), tmp_path / "v4"
    for to in ("stacked", "fused-2025", "per-expert", "stacked"):
        convert(path, path := tmp_path / f"{path.name} {to}", to, check=True)
        if to != "fused-2025":
            again = AutoModelForCausalLM.from_pretrained(path).eval()
            assert torch.equal(again(input_ids).logits, model(input_ids).logits)


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
def test_a_killed_process_leaves_the_source_and_no_target_and_can_be_repeated(tmp_path, event, path):
    """By SIGKILL, at what the interpreter reports to its audit hooks just before it does it."""
    script = """
import os, runpy, signal, sys

event, path = sys.argv.pop(1), sys.argv.pop(1)

def kill(name, arguments):
    if name == event and path in str(arguments[0]):
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(kill)
runpy.run_module("qwen3_moe_integration", run_name="__main__")
"""
    want = {**random_experts(), **others()}
    arguments = [str(save(tmp_path / "v4", want, files=3)), str(tmp_path / "out"), "--to", "stacked", "--check"]
    run = subprocess.run(
        [sys.executable, "-c", script, event, path, "convert", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "integration")},
    )
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


@pytest.mark.parametrize("first, to", [("per-expert", "stacked"), ("stacked", "per-expert")])
@pytest.mark.parametrize("pack", [lambda tensors: tensors, in_4_bit], ids=["dense", "4 bit"])
def test_memory_stays_under_one_stack_of_experts(tmp_path, first, to, pack):
    """2 layers in 2 files, converted in a process that reports its peak."""
    script = """
import re, sys
from qwen3_moe_integration.convert import convert_checkpoint

def bytes_of(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

small, large, folder, to = sys.argv[1:]
convert_checkpoint(small, folder + "/small out", to, check=True)  # everything is loaded and allocated once
open("/proc/self/clear_refs", "w").write("5")  # the peak is now what is in memory
before = bytes_of("VmRSS")
convert_checkpoint(large, folder + "/large out", to, check=True)
print(bytes_of("VmHWM") - before)
"""
    sizes = {"H": 1024, "I": 512}
    small, large = random_experts(**sizes, E=2), random_experts(**sizes, E=16, layers=range(2))
    if first == "stacked":
        small, large = stacked(small), stacked(large)
    large = pack(large)
    save(tmp_path / "small", pack(small))
    save(tmp_path / "large", large, files=2)
    stack = sum(tensor.nbytes for key, tensor in large.items() if "layers.1" in key and "down_proj" in key)
    run = subprocess.run(
        [sys.executable, "-c", script, *map(str, (tmp_path / "small", tmp_path / "large", tmp_path, to))],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "integration")},
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < stack, f"{run.stdout} bytes more for stacks of {stack}"
    assert f"writing {to}" in run.stderr
    assert_same_bits(by_expert(decoded(large)), by_expert(decoded(load(tmp_path / "large out"))))


def test_the_command_line_converts_a_checkpoint_and_names_errors(tmp_path, capsys):
    want = random_experts()
    save(tmp_path / "v4", want)
    command = ["convert", str(tmp_path / "v4"), str(tmp_path / "out"), "--to"]
    assert main([*command, "peft"]) == 1
    assert "for a checkpoint, got 'peft'" in capsys.readouterr().err
    assert main([*command, "stacked", "--uniform"]) == 1
    assert "uniform is for adapters" in capsys.readouterr().err
    assert main([*command, "fused-2025", "--check"]) == 0
    assert "fused-2025, checked" in capsys.readouterr().out
    assert_same_bits(want, by_expert(load(tmp_path / "out")))
