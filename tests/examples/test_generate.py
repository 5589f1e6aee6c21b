"""examples/generate.py as a user runs it."""

import re
from collections.abc import Callable

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen3_moe_integration import expert_lora_config, lora_linear
from tests import programs
from tests.conftest import ROOT
from tests.kernel.oracle import assert_close


@pytest.fixture(scope="module")
def generate(variables, tmp_path_factory) -> Callable[..., str]:
    output = tmp_path_factory.mktemp("generate")

    def run(*arguments, fresh: bool = False) -> str:
        script = (ROOT / "examples/generate.py", "--output", output, "--tokens", 8)
        ran = programs.run(*script, *arguments, variables=variables, fresh=fresh)
        assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"
        return ran.stdout

    run.output = output
    return run


@pytest.fixture(scope="module")
def base(generate) -> str:
    """What a run without arguments prints."""
    return generate()


def test_4_bit_weights_generate_take_less_memory_and_say_the_same_when_saved(generate, tmp_path):
    full = generate("--bits", 16)
    first = generate("--save", tmp_path / "saved")
    again = generate("--model", tmp_path / "saved", "--compile", fresh=True)
    assert "bitsandbytes_moe" in (tmp_path / "saved" / "config.json").read_text()
    for printed in (full, first, again):
        assert "Kernel: 3 Mixture-of-Experts layers" in printed
        for when in ("prompt", "then"):
            assert float(re.search(rf"{when}, tokens a second +(\S+)", printed)[1]) > 0
        assert re.search(r"peak (GPU|process) memory +[1-9]\d* MiB", printed)
    assert 3 * _weights(first) < _weights(full) and _weights(again) == _weights(first)
    assert _text(again) == _text(first)


def test_an_adapter_changes_what_is_said(generate, base, tmp_path):
    """One of zeros says the same as the model alone, one of large numbers something else."""
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("linear", [["q_proj", "o_proj"], []], ids=["of attention too", "of experts"])
def test_an_adapter_has_the_dtype_of_the_model_and_says_what_peft_says(
    generate, kernel_dir, tmp_path, monkeypatch, linear, bits, dtype
):
    """Word for word in fp32. In bf16 PEFT multiplies by its adapter in fp32, and routers near a tie take others."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    from generate import with_adapter
    from kernelized import DEVICE, load_model
    from tiny_checkpoint import small_model

    path, seen, forward = small_model(generate.output), [], lora_linear._AddLora.forward
    spy = staticmethod(lambda ctx, x, *others: seen.append(x.dtype) or forward(ctx, x, *others))
    monkeypatch.setattr(lora_linear._AddLora, "forward", spy)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    model = get_peft_model(model, expert_lora_config(2, target_modules=linear))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)  # in fp32, as PEFT has made it

    def answers(load) -> tuple[set[torch.dtype], torch.Tensor, torch.Tensor]:
        """The adapter's dtypes, the tokens, and the logits of the first of them."""
        model = load(load_model(path, bits, dtype, "inference", kernel_dir), tmp_path)
        dtypes = {parameter.dtype for name, parameter in model.named_parameters() if "lora_" in name}
        prompt = torch.arange(300, 340, device=DEVICE)[None]
        settings = {"do_sample": False, "repetition_penalty": 9.0, "min_new_tokens": 12, "max_new_tokens": 12}
        settings |= {"output_logits": True, "return_dict_in_generate": True}
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
        return dtypes, out.sequences[0, 40:], out.logits[0]

    (_, want, want_logits), by_peft = answers(PeftModel.from_pretrained), len(seen)
    dtypes, got, logits = answers(with_adapter)
    assert dtypes == {dtype}
    assert not by_peft and set(seen) == ({dtype} if linear and bits == 4 else set()), "who adds attention's"
    assert len(want.unique()) == 12 and logits.isfinite().all()
    if dtype == torch.float32:
        assert torch.equal(got, want)
        assert_close("logits", want_logits, logits, 1e-4)


def test_a_folder_without_an_adapter_is_refused_before_a_model_is_loaded(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import generate

    monkeypatch.setattr(generate, "load_model", lambda *_: pytest.fail("a model is loaded"))
    with pytest.raises(SystemExit):
        generate.main(["--adapter", str(tmp_path)])
    assert f"--adapter: {tmp_path} has no adapter_config.json" in capsys.readouterr().err


def test_text_is_printed_as_it_comes(generate, base, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "examples")
    from generate import TimedStreamer

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
