"""4-bit models on disk: saved without a word and loaded again as they were, and never loaded wrongly."""

import json
import os

import pytest
import torch
from bitsandbytes.functional import QuantState
from transformers import AutoModelForCausalLM, modeling_utils

from qwen3_moe_integration import MoeBitsAndBytesConfig
from tests import programs
from tests.integration.models import ExpertsCalls, tokens
from tests.integration.quantized import (
    NESTED,
    PLAIN_FP4,
    assert_same_model,
    checkpoint,
    edit,
    edit_config,
    load,
)

STACK = "model.layers.1.mlp.experts.gate_up_proj"
BLOB = f"{STACK}.quant_state.bitsandbytes__nf4"
CROSSING = MoeBitsAndBytesConfig(experts_blocksize=1024)
QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def quantized(registered, tmp_path):
    """A 4-bit model, and the folder in which it is saved."""
    checkpoint(tmp_path / "full")
    model = load(tmp_path / "full", NESTED)
    model.save_pretrained(tmp_path / "quantized", max_shard_size="15KB")
    return model, tmp_path / "quantized"


@pytest.mark.compat
@pytest.mark.parametrize(
    "config", [NESTED, PLAIN_FP4, CROSSING], ids=["nf4 nested", "fp4", "blocks that cross experts"]
)
def test_what_was_saved_loads_again_bit_for_bit(registered, tmp_path, config):
    checkpoint(tmp_path / "full")
    model = load(tmp_path / "full", config)
    model.save_pretrained(tmp_path / "quantized", max_shard_size="12KB")
    assert len([*(tmp_path / "quantized").glob("*.safetensors")]) > 3
    again = load(tmp_path / "quantized")
    assert_same_model(model, again)
    input_ids = tokens()
    with ExpertsCalls() as calls:
        assert torch.equal(model(input_ids).logits, again(input_ids).logits)
    assert calls.forward == 4


def test_config_json_says_what_it_is(quantized):
    written = json.loads((quantized[1] / "config.json").read_text())["quantization_config"]
    assert len(written.pop("save_id")) == 16
    assert written == {
        "quant_method": "bitsandbytes_moe",
        "llm_int8_skip_modules": None,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": "uint8",
        "experts_blocksize": 64,
    }


def test_transformers_alone_refuses_to_load_it(quantized, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        f"from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained({str(quantized[1])!r})"
    )
    run = programs.run(program)
    assert run.returncode and "Unknown quantization type, got bitsandbytes_moe" in run.stdout + run.stderr


def save_until_interrupted(model, folder, monkeypatch, shard_size: str, whole: int, half: bool = False) -> None:
    """Writes ``whole`` files, and half of the next one if that is asked for."""
    written = []

    def stop(tensors, file, **kwargs):
        if len(written) < whole or half:
            save_file(tensors, file, **kwargs)
        if len(written) == whole:
            if half:
                os.truncate(file, os.path.getsize(file) // 2)
            raise KeyboardInterrupt
        written.append(file)

    save_file = modeling_utils.safe_save_file
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(modeling_utils, "safe_save_file", stop)
        model.save_pretrained(folder, max_shard_size=shard_size)


def test_a_save_that_was_interrupted_over_another_one_does_not_load(quantized, monkeypatch):
    model, folder = quantized
    save_until_interrupted(model, folder, monkeypatch, "15KB", whole=1)
    with pytest.raises(ValueError, match=r"model-0000\d-of.* of different saves .*interrupted"):
        load(folder)
    model.save_pretrained(folder, max_shard_size="15KB")
    assert_same_model(model, load(folder))


FIRST_SAVES = [
    ("15KB", 0, False, "no file named model.safetensors"),
    ("15KB", 1, True, "no file named model.safetensors"),
    ("1GB", 0, False, "no file named model.safetensors"),
    ("1GB", 0, True, r"model.safetensors is truncated: \S+ ends at byte"),
]


@pytest.mark.parametrize(("shard_size", "whole", "half", "message"), FIRST_SAVES)
def test_a_first_save_that_was_interrupted_does_not_load(
    quantized, tmp_path, monkeypatch, shard_size, whole, half, message
):
    save_until_interrupted(quantized[0], tmp_path / "new", monkeypatch, shard_size, whole, half)
    with pytest.raises((OSError, ValueError), match=message):
        load(tmp_path / "new")


@pytest.mark.parametrize("whole", [0, 1])
def test_a_save_in_another_precision_that_was_interrupted_does_not_load(quantized, tmp_path, monkeypatch, whole):
    """Over the checkpoint in full precision that a 4-bit model was made of, and the other way round."""
    model, folder = quantized
    full = load(tmp_path / "full")
    for each, over in ((model, tmp_path / "full"), (full, folder)):
        save_until_interrupted(each, over, monkeypatch, "15KB", whole)
        with pytest.raises(FileNotFoundError, match=r"model-00001-of-0000\d.safetensors"):
            load(over)


def test_a_save_in_4_bit_that_left_the_file_in_full_precision_does_not_load(quantized, tmp_path, monkeypatch):
    """Both are called model.safetensors, and experts in full precision would be quantized."""
    load(tmp_path / "full").save_pretrained(tmp_path / "one file")
    save_until_interrupted(quantized[0], tmp_path / "one file", monkeypatch, "1GB", whole=0)
    with pytest.raises(ValueError, match=r"model.safetensors .* of different saves \(save_id None and \w{16}\)"):
        load(tmp_path / "one file")


def test_an_older_file_that_transformers_prefers_does_not_pass_for_the_model(quantized):
    """Transformers leaves model.safetensors of an unsharded save where it is, and loads it rather than the shards."""
    model, folder = quantized
    model.save_pretrained(folder)
    model.save_pretrained(folder, max_shard_size="15KB")
    with pytest.raises(ValueError, match=r"model.safetensors and its config.json are of different saves"):
        load(folder)


@pytest.mark.parametrize(
    ("left", "message"), [(0.9, r"\S+ ends at byte"), (0.01, "less than its header"), (0, "less than its header")]
)
def test_a_truncated_file_is_an_error_that_names_it(quantized, left, message):
    file = sorted(quantized[1].glob("*.safetensors"))[1]
    os.truncate(file, int(left * file.stat().st_size))
    with pytest.raises(ValueError, match=rf"{file.name} is truncated: .*{message}"):
        load(quantized[1])


def rewritten(blob=BLOB, **changes):
    """Changes a quant_state: its numbers, in JSON."""

    def change(tensors):
        numbers = json.loads(bytes(tensors[blob].tolist())) | changes
        tensors[blob] = torch.tensor([*json.dumps(numbers).encode()], dtype=torch.uint8)

    return change


def shortened(key):
    return lambda tensors: tensors.update({key: tensors[key][:-1].clone()})


def at_the_end(key, value):
    """The last number is another one."""
    return lambda tensors: tensors[key].view(-1)[-1:].fill_(value)


def cast(key, dtype=torch.float16):
    return lambda tensors: tensors.update({key: tensors[key].to(dtype)})


def without(*keys):
    return lambda tensors: [tensors.pop(key) for key in keys]


DAMAGE = [
    (without(f"{STACK}.absmax"), f"{STACK} is in 4 bit, but the checkpoint has no absmax of it"),
    (without(BLOB), f"{STACK} is in 4 bit, but the checkpoint has no quant_state of it"),
    (without(STACK), f"{STACK}: the checkpoint has 0 tensors .*, but 1 absmax"),
    (
        lambda tensors: [tensors.pop(key) for key in [*tensors] if key.startswith(STACK)],
        f"{STACK}: the checkpoint has nothing of it",
    ),
    (
        lambda tensors: [tensors.pop(key) for key in [*tensors] if "1.self_attn.v_proj" in key],
        "model.layers.1.self_attn.v_proj.weight: the checkpoint has nothing of it",
    ),
    (shortened(STACK), f"{STACK}: 6143 bytes instead of 6144"),
    (shortened(f"{STACK}.absmax"), f"{STACK}: 191 absmax of torch.uint8 instead of 192 of torch.uint8"),
    (shortened(f"{STACK}.nested_quant_map"), f"{STACK}: 255 nested_quant_map of torch.float32 instead of 256 of"),
    (rewritten(shape=[8, 24, 32]), f"{STACK}: 192 absmax of torch.uint8 instead of 96 .*, 6144 bytes instead of 3072"),
    (rewritten(shape=[8, 32, 48]), rf"{STACK}: its parts must make up \(8, 48, 32\), got 1 of \(8, 32, 48\)"),
    (
        rewritten(f"{QUERY}.quant_state.bitsandbytes__nf4", shape=[16, 64]),
        rf"{QUERY}: the model wants a shape of \(32, 32\), the checkpoint has \(16, 64\)",
    ),
    (rewritten(quant_type="int4"), f"{STACK}: its quant_type must be one of .*, got 'int4'"),
    (rewritten(blocksize=100), f"{STACK}: its blocksize must be one of .*, got 100"),
    (rewritten(dtype="float64"), f"{STACK}: its dtype must be one of .*, got 'float64'"),
    (rewritten(nested_blocksize=0), f"{STACK}: its nested_blocksize must be one of .*, got 0"),
    (rewritten(nested_offset=None), f"{STACK}: its nested_offset must be a finite number, got None"),
    (rewritten(nested_offset=float("nan")), f"{STACK}: its nested_offset must be a finite number, got nan"),
    (at_the_end(f"{STACK}.nested_absmax", float("nan")), f"{STACK}: its nested_absmax must be finite, got 1 that are"),
    (at_the_end(f"{QUERY}.nested_quant_map", 0.5), f"{QUERY}: its nested_quant_map is not that of bitsandbytes"),
    (at_the_end(f"{QUERY}.quant_map", float("nan")), f"{QUERY}: its quant_map is not that of nf4"),
    (rewritten(shape=None), f"{STACK}: its shape must be a list of two sizes or more, got None"),
    (rewritten(shape=[-8, -48, 32]), rf"{STACK}: its shape must be a list .*, got \[-8, -48, 32\]"),
    (rewritten(quant_type="fp4"), f"{STACK}: its quant_map is not that of fp4"),
    (cast(f"{QUERY}.absmax"), f"{QUERY}: 16 absmax of torch.float16 instead of 16 of torch.uint8"),
    (cast(f"{QUERY}.quant_map"), f"{QUERY}: 16 quant_map of torch.float16 instead of 16 of torch.float32"),
    (cast(f"{QUERY}.nested_absmax"), f"{QUERY}: 1 nested_absmax of torch.float16 instead of 1 of torch.float32"),
    (without(f"{QUERY}.nested_absmax"), f"{QUERY}: 0 nested_absmax of .* instead of 1"),
    (
        without(f"{QUERY}.nested_absmax", f"{QUERY}.nested_quant_map"),
        f"{QUERY}: 16 absmax of torch.uint8 instead of 16",
    ),
    (lambda tensors: tensors.update({BLOB: tensors[BLOB][3:].clone()}), f"{STACK}: its quant_state cannot be read"),
    (
        without(f"{QUERY}.quant_map"),
        f"{QUERY} is in 4 bit, but the checkpoint has no quant_map of it",
    ),
    (
        lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}),
        r"model.norm.weight: the model wants a shape of \(32,\), the checkpoint has \(31,\)",
    ),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_a_damaged_checkpoint_is_an_error_that_names_the_tensor(quantized, damage, message):
    edit(quantized[1], damage)
    with pytest.raises(ValueError, match=message):
        load(quantized[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_plain_scales_that_are_no_numbers_are_an_error(registered, tmp_path, value):
    checkpoint(tmp_path / "full")
    load(tmp_path / "full", PLAIN_FP4).save_pretrained(tmp_path / "quantized")
    edit(tmp_path / "quantized", at_the_end(f"{STACK}.absmax", value))
    with pytest.raises(ValueError, match=f"{STACK}: its absmax must be finite, got 1 that are not"):
        load(tmp_path / "quantized")


@pytest.mark.parametrize("name", [STACK, QUERY])
def test_packed_weights_that_were_cast_as_if_they_were_numbers_are_an_error(registered, tmp_path, name):
    checkpoint(tmp_path / "full")
    load(tmp_path / "full", PLAIN_FP4).save_pretrained(tmp_path / "quantized")
    edit(tmp_path / "quantized", cast(name))
    with pytest.raises(ValueError, match=f"{name} must be stored as torch.bfloat16, .*, got torch.float16"):
        load(tmp_path / "quantized")


@pytest.mark.compat
def test_a_stack_in_4_bit_that_is_to_stay_as_it_is_is_an_error(quantized):
    edit_config(quantized[1], llm_int8_skip_modules=["experts.gate_up_proj"])
    with pytest.raises(ValueError, match=r"experts.gate_up_proj is in 4 bit, but was to stay as it is"):
        load(quantized[1])


def test_the_state_dict_is_all_it_takes(quantized):
    """Other savers than Transformers see the statistics too."""
    model, _ = quantized
    state_dict = {key: tensor.clone() for key, tensor in model.state_dict().items() if key.startswith(STACK)}
    packed = state_dict.pop(STACK)
    state = QuantState.from_dict({key[len(STACK) + 1 :]: x for key, x in state_dict.items()}, device=packed.device)
    assert state == model.get_parameter(STACK).quant_state and state.shape == (8, 48, 32)


def test_auto_model_takes_a_dict_too(registered, tmp_path):
    checkpoint(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=NESTED.to_dict(), dtype=torch.bfloat16)
    assert_same_model(model, load(tmp_path, NESTED))
