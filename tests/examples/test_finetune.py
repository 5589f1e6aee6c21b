"""examples/finetune.py as a user runs it: a command, its output, and the files it leaves."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.examples.runs import ADAPTER, SMALL, STEPS, WHOLE, before_and_after, log_of, losses_of


def test_the_loss_falls_and_the_files_are_there(whole):
    printed = (whole / "printed").read_text()
    assert "Kernel: 3 Mixture-of-Experts layers" in printed
    before, after = before_and_after(printed)
    assert after < before - 0.5
    for picture in ("loss.png", "throughput.png"):
        assert (whole / picture).read_bytes().startswith(b"\x89PNG")
    names = {path.name for path in (whole / "small-qwen3-moe").iterdir()}
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} <= names
    assert not list(whole.glob("*.part*"))


def test_in_4_bit_the_loss_falls_too(adapter):
    before, after = before_and_after((adapter / "printed").read_text())
    assert after < before - 0.1
    assert {path.name for path in (adapter / "model").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}


def test_the_best_checkpoint_is_what_is_saved(finetune, whole, tmp_path):
    """Not the last one: what is held out, the first sequence, is of another kind, and is soon unlearned."""
    (tmp_path / "small-qwen3-moe").symlink_to(whole / "small-qwen3-moe")
    held_out = (
        "The quick brown fox jumps over one lazy dog; while zebras, kings and 17 vexed wizards buy gum from Bob. "
    )
    trained = "A grouped product multiplies every row by the matrix of its own expert. "
    text = tmp_path / "notes.jsonl"
    text.write_text("\n".join(json.dumps({"text": document}) for document in (held_out * 2, trained * 20)))
    arguments = ("--dataset", text, "--output", tmp_path, "--steps", STEPS, "--lr", 0.03)
    printed = finetune(*arguments, *ADAPTER)
    evaluated = {entry["step"]: entry["eval_loss"] for entry in log_of(tmp_path) if "eval_loss" in entry}
    del evaluated[0]
    best = min(evaluated, key=evaluated.get)
    assert evaluated[best] < evaluated[STEPS] - 0.05
    assert before_and_after(printed)[1] == pytest.approx(evaluated[best], abs=1e-4)
    saved, best, last = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (tmp_path / "model", *(tmp_path / "checkpoints" / f"checkpoint-{n}" for n in (best, STEPS)))
    )
    assert saved.keys() == best.keys() == last.keys()
    assert all(torch.equal(saved[name], best[name]) for name in saved)
    assert not all(torch.equal(saved[name], last[name]) for name in saved)


@pytest.mark.parametrize("triton_interpret", ["1", pytest.param("0", marks=pytest.mark.gpu)])
def test_trl_trains_with_the_routers_loss(finetune, text, whole, tmp_path, triton_interpret):
    """TRL adds the routers' auxiliary loss, so their logits must still be recorded."""
    (tmp_path / "small-qwen3-moe").symlink_to(whole / "small-qwen3-moe")
    arguments = ("--trainer", "sft", "--dataset", text, "--output", tmp_path, "--steps", 4, "--lr", 1e-2, *WHOLE)
    printed = finetune(*arguments, TRITON_INTERPRET=triton_interpret)
    before, after = before_and_after(printed)
    assert after < before - 0.5
    history = json.loads((tmp_path / "checkpoints" / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    aux_losses = [entry["aux_loss"] for entry in history if "aux_loss" in entry]
    assert len(aux_losses) == 4 and all(4 <= loss < 8 for loss in aux_losses)  # k experts per token: k if balanced


@pytest.mark.gpu
def test_graphs_change_no_loss(finetune, text, whole, tmp_path):
    losses = []
    for graphs in ("--graphs", "--no-graphs"):
        output = tmp_path / graphs
        output.mkdir()
        (output / "small-qwen3-moe").symlink_to(whole / "small-qwen3-moe")
        arguments = ("--dataset", text, "--output", output, "--steps", STEPS, "--gradient-checkpointing", graphs)
        assert "without CUDA graphs" not in finetune(*arguments, *ADAPTER)
        losses.append(losses_of(output))
    assert losses[0] == losses[1] and len(losses[0]) >= STEPS


@pytest.mark.gpu
def test_trl_trains_in_graphs(finetune, text, whole, tmp_path):
    (tmp_path / "small-qwen3-moe").symlink_to(whole / "small-qwen3-moe")
    arguments = ("--dataset", text, "--output", tmp_path, "--steps", STEPS, "--trainer", "sft", *ADAPTER)
    printed = finetune(*arguments, "--gradient-checkpointing", "--graphs")
    assert "without CUDA graphs" not in printed
    before, after = before_and_after(printed)
    assert after < before - 0.1


def test_trl_on_a_cpu_says_what_it_needs(finetune, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    message = finetune("--trainer", "sft", "--output", tmp_path, code=1, TRITON_INTERPRET="0")
    assert "needs a GPU" in message


def test_an_adapter_loads_with_stock_libraries(whole, adapter):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(whole / "small-qwen3-moe")
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        untrained = base(tokens).logits
        adapted = PeftModel.from_pretrained(base, adapter / "model")(tokens).logits
    assert torch.isfinite(adapted).all()
    assert (adapted - untrained).norm() > 1e-3 * untrained.norm()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "there is no file"),
        ("broken.jsonl", '{"text": "one"}\n{"body": "two"}', "line 2"),
        ("short.txt", "Too little.", "too few"),
    ],
)
def test_bad_text_is_named_before_training(finetune, whole, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    (tmp_path / "small-qwen3-moe").symlink_to(whole / "small-qwen3-moe")
    arguments = ("--dataset", tmp_path / name, "--output", tmp_path)
    assert message in finetune(*arguments, *SMALL, code=1)
