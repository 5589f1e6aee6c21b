"""Checkpoints between layouts: dense and 4-bit weights keep their bits, in memory that does not grow with the model."""

import itertools
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from qwen3_moe_integration.__main__ import main
from qwen3_moe_integration.convert import CHECKPOINT_FORMATS, convert, convert_checkpoint
from tests import programs
from tests.conftest import ROOT
from tests.integration.checkpoints import (
    BLOCK,
    assert_same_bits,
    by_expert,
    decoded,
    in_4_bit,
    load,
    others,
    random_experts,
    save,
    stacked,
)
from tests.integration.models import QWEN3, tokens

VARIABLES = {"PYTHONPATH": str(ROOT / "integration")}


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


@pytest.mark.parametrize(
    ("first", "to", "pack"),
    [("per-expert", "stacked", lambda tensors: tensors), ("stacked", "per-expert", in_4_bit)],
    ids=["dense", "4 bit"],
)
def test_memory_stays_under_one_stack_of_experts(tmp_path, first, to, pack):
    """2 layers in 2 files, converted in a process that reports its peak."""
    script = tmp_path / "script.py"
    script.write_text("""
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
""")
    sizes = {"H": 1024, "I": 512}
    small, large = random_experts(**sizes, E=2), random_experts(**sizes, E=16, layers=range(2))
    if first == "stacked":
        small, large = stacked(small), stacked(large)
    large = pack(large)
    save(tmp_path / "small", pack(small))
    save(tmp_path / "large", large, files=2)
    stack = sum(tensor.nbytes for key, tensor in large.items() if "layers.1" in key and "down_proj" in key)
    run = programs.run(script, tmp_path / "small", tmp_path / "large", tmp_path, to, variables=VARIABLES)
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
