"""examples/generate.py as a user runs it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen3_moe_integration import expert_lora_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def generate(kernel_dir, tmp_path_factory):
    output = tmp_path_factory.mktemp("generate")

    def run(*arguments) -> str:
        variables = {
            "LOCAL_KERNELS": f"org/qwen3-moe-fused={kernel_dir}",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT / "integration"), os.environ.get("PYTHONPATH", "")]),
        }
        command = [sys.executable, str(ROOT / "examples" / "generate.py"), "--output", str(output), "--tokens", "8"]
        command += map(str, arguments)
        ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables, timeout=600)
        assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"
        return ran.stdout

    run.output = output
    return run


def test_4_bit_weights_generate_take_less_memory_and_say_the_same_when_saved(generate, tmp_path):
    full = generate("--bits", 16)
    first = generate("--save", tmp_path / "saved")
    again = generate("--model", tmp_path / "saved", "--compile")
    assert "bitsandbytes_moe" in (tmp_path / "saved" / "config.json").read_text()
    for printed in (full, first, again):
        assert "Kernel: 3 Mixture-of-Experts layers" in printed
        for when in ("prompt", "then"):
            assert float(re.search(rf"{when}, tokens a second +(\S+)", printed)[1]) > 0
        assert re.search(r"peak (GPU|process) memory +[1-9]\d* MiB", printed)
    assert 3 * _weights(first) < _weights(full) and _weights(again) == _weights(first)
    assert _text(again) == _text(first)


def test_an_adapter_changes_what_is_said(generate, tmp_path):
    """One of zeros says the same as the model alone, one of large numbers something else."""
    base = generate()
    model = AutoModelForCausalLM.from_pretrained(generate.output / "small-qwen3-moe")
    model = get_peft_model(model, expert_lora_config(2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "zeros")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path / "noise")
    zeros, noise = (generate("--adapter", tmp_path / name) for name in ("zeros", "noise"))
    assert _text(zeros) == _text(base) != _text(noise)


def test_text_is_printed_as_it_comes(generate, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "examples")
    from generate import TimedStreamer

    generate()
    tokenizer = AutoTokenizer.from_pretrained(generate.output / "small-qwen3-moe")
    streamer, seen = TimedStreamer(tokenizer), []
    for tokens in ([tokenizer("Some words ").input_ids], *tokenizer("and some more after them ").input_ids):
        streamer.put(torch.tensor(tokens).view(1, -1) if isinstance(tokens, list) else torch.tensor([tokens]))
        seen.append(capsys.readouterr().out)
    assert len(seen) == len(streamer.times) > 4 and streamer.times == sorted(streamer.times)
    assert "".join(seen).startswith("Some words and some more") and sum(map(bool, seen)) > 4


def _weights(printed: str) -> float:
    return float(re.search(r"memory of the weights +(\S+) MiB", printed)[1])


def _text(printed: str) -> str:
    """The prompt, how it goes on, and nothing of the table that follows."""
    return re.search(r"^A grouped product.+?(?=\n\nprompt, tokens a second)", printed, re.DOTALL | re.MULTILINE)[0]
