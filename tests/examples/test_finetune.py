"""examples/finetune.py as a user runs it: a command, its output, and the files it leaves."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--seq-len", "32", "--batch-size", "4", "--save-every", "4")
WHOLE = ("--bits", "16", *SMALL)
"""The small model is trained whole."""
ADAPTER = (*SMALL, "--expert-rank", "2")
STEPS = 20


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Two documents, few enough that evaluation takes no time."""
    path = tmp_path_factory.mktemp("text") / "notes.jsonl"
    documents = ["A grouped product multiplies every row by the matrix of its own expert. " * 60, "A short one. " * 40]
    path.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    return path


@pytest.fixture(scope="module")
def start(kernel_dir) -> Callable[..., subprocess.Popen]:
    def start(*arguments, preexec_fn: Callable[[], None] | None = None, **variables: str) -> subprocess.Popen:
        variables["LOCAL_KERNELS"] = f"org/qwen3-moe-fused={kernel_dir}"
        variables["HF_HUB_OFFLINE"] = "1"
        variables["PYTHONPATH"] = os.pathsep.join([str(ROOT / "integration"), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, str(ROOT / "examples" / "finetune.py"), *map(str, arguments)]
        settings = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "preexec_fn": preexec_fn}
        return subprocess.Popen(command, env=os.environ | variables, **settings)

    return start


@pytest.fixture(scope="module")
def finetune(start):
    def run(*arguments, code: int = 0, **settings) -> str:
        with start(*arguments, **settings) as process:
            printed, _ = process.communicate(timeout=600)
        assert process.returncode == code, printed
        return printed

    return run


@pytest.fixture(scope="module")
def whole(finetune, text, tmp_path_factory) -> Path:
    """The folder of a run that nothing interrupted, one epoch and a half long, and what it printed."""
    output = tmp_path_factory.mktemp("whole")
    (output / "printed").write_text(finetune("--dataset", text, "--output", output, "--steps", STEPS, *WHOLE))
    return output


@pytest.fixture(scope="module")
def adapter(finetune, text, whole, tmp_path_factory) -> Path:
    """The folder of a run, as long, that trained a LoRA of attention and experts in 4 bit, and what it printed."""
    output = tmp_path_factory.mktemp("adapter")
    (output / "small-qwen3-moe").symlink_to(whole / "small-qwen3-moe")
    (output / "printed").write_text(finetune("--dataset", text, "--output", output, "--steps", STEPS, *ADAPTER))
    return output


def test_the_loss_falls_and_the_files_are_there(whole):
    printed = (whole / "printed").read_text()
    assert "Kernel: 3 Mixture-of-Experts layers" in printed
    before, after = _before_and_after(printed)
    assert after < before - 0.5
    for picture in ("loss.png", "throughput.png"):
        assert (whole / picture).read_bytes().startswith(b"\x89PNG")
    names = {path.name for path in (whole / "small-qwen3-moe").iterdir()}
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} <= names
    assert not list(whole.glob("*.part*"))


def test_in_4_bit_the_loss_falls_too(adapter):
    before, after = _before_and_after((adapter / "printed").read_text())
    assert after < before - 0.1
    assert {path.name for path in (adapter / "model").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    state = json.loads((adapter / "checkpoints" / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    evaluated = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    assert state["best_metric"] == min(evaluated[1:]) and after == pytest.approx(min(evaluated[1:]), abs=1e-4)


@pytest.mark.parametrize("trained", ["whole", "adapter"])
def test_a_killed_run_resumes_to_the_same_losses(finetune, text, request, tmp_path, trained):
    """Killed in the second epoch, while it wrote its next checkpoint, and again: neither is complete."""
    uninterrupted = request.getfixturevalue(trained)
    (tmp_path / "small-qwen3-moe").symlink_to(request.getfixturevalue("whole") / "small-qwen3-moe")
    for step in (18, 19):
        (tmp_path / "checkpoints" / f"checkpoint-{step}").mkdir(parents=True)
    (tmp_path / "checkpoints" / "checkpoint-19" / "trainer_state.json").write_text('{"global_step": 19, "log_hist')
    (tmp_path / "checkpoints" / "checkpoint-16").symlink_to(uninterrupted / "checkpoints" / "checkpoint-16")
    settings = WHOLE if trained == "whole" else ADAPTER
    printed = finetune("--dataset", text, "--output", tmp_path, "--steps", STEPS, "--resume", *settings)
    assert "missing keys" not in printed
    want, got = _losses(uninterrupted), _losses(tmp_path)
    assert sum(step > 16 for step, _, _ in want) >= 3
    assert got == want


@pytest.mark.skipif(torch.cuda.is_available(), reason="losses with and without checkpointing are compared bit by bit")
def test_a_run_that_is_killed_goes_on_in_graphs_too(start, finetune, text, whole, adapter, tmp_path):
    """By SIGKILL, between steps or while saving. On a CPU graphs give way to usual checkpointing, and that is said."""
    (tmp_path / "small-qwen3-moe").symlink_to(whole / "small-qwen3-moe")
    graphs = ("--gradient-checkpointing", "--graphs")
    arguments = ("--dataset", text, "--output", tmp_path, "--steps", STEPS, *ADAPTER, *graphs)
    with start(*arguments) as process:
        while not list(tmp_path.glob("checkpoints/checkpoint-*/trainer_state.json")):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        process.kill()
    assert process.returncode == -9 and not (tmp_path / "model").exists()
    printed = finetune(*arguments, "--resume")
    assert printed.count("is checkpointed without CUDA graphs: it runs on cpu") == 1
    assert "going on from" in printed and _losses(tmp_path) == _losses(adapter)


def test_a_full_disk_keeps_the_last_checkpoint(finetune, text, whole, adapter, tmp_path, monkeypatch):
    """A file that may grow no further fails in the middle of its writing, as it does on a full disk."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from finetune import complete_checkpoints

    (tmp_path / "small-qwen3-moe").symlink_to(whole / "small-qwen3-moe")
    good = tmp_path / "checkpoints" / "checkpoint-16"
    shutil.copytree(adapter / "checkpoints" / "checkpoint-16", good)
    before = {path.name: path.read_bytes() for path in good.iterdir()}
    weights, states = (len(before[name]) for name in ("adapter_model.safetensors", "optimizer.pt"))
    most = (weights + states) // 2
    finetune(
        "--dataset", text, "--output", tmp_path, "--steps", STEPS, "--resume", *ADAPTER, code=1,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)),
    )  # fmt: skip
    broken = tmp_path / "checkpoints" / f"checkpoint-{STEPS}"
    assert (broken / "adapter_model.safetensors").exists() and not (broken / "trainer_state.json").exists()
    assert complete_checkpoints(tmp_path / "checkpoints") == {16: good}
    assert {path.name: path.read_bytes() for path in good.iterdir()} == before
    assert not (tmp_path / "model").exists()


def test_a_new_run_does_not_start_among_the_checkpoints_of_another(tmp_path, monkeypatch):
    """Killed before it has come as far, it would be resumed as that one."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import finetune

    new, resumed = (finetune.parse(["--output", str(tmp_path), *more]) for more in ([], ["--resume"]))
    state = tmp_path / "checkpoints" / "checkpoint-8" / "trainer_state.json"
    state.parent.mkdir(parents=True)
    for part in ("", '{"global_step": 8'):
        state.write_text(part)
        assert finetune.checkpoint_to_resume(new) is None
        with pytest.raises(SystemExit, match="--resume: there is no complete checkpoint in"):
            finetune.train(resumed)
    state.write_text('{"global_step": 8}')
    assert finetune.checkpoint_to_resume(resumed) == state.parent
    with pytest.raises(SystemExit, match="has checkpoints of an earlier run; go on from them with --resume"):
        finetune.train(new)
    assert [*tmp_path.rglob("*.*")] == [state]


@pytest.mark.parametrize("triton_interpret", ["1", pytest.param("0", marks=pytest.mark.gpu)])
def test_trl_trains_with_the_routers_loss(finetune, text, whole, tmp_path, triton_interpret):
    """TRL adds the routers' auxiliary loss, so their logits must still be recorded."""
    (tmp_path / "small-qwen3-moe").symlink_to(whole / "small-qwen3-moe")
    arguments = ("--trainer", "sft", "--dataset", text, "--output", tmp_path, "--steps", 4, "--lr", 1e-2, *WHOLE)
    printed = finetune(*arguments, TRITON_INTERPRET=triton_interpret)
    before, after = _before_and_after(printed)
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
        losses.append(_losses(output))
    assert losses[0] == losses[1] and len(losses[0]) >= STEPS


@pytest.mark.gpu
def test_trl_trains_in_graphs(finetune, text, whole, tmp_path):
    (tmp_path / "small-qwen3-moe").symlink_to(whole / "small-qwen3-moe")
    arguments = ("--dataset", text, "--output", tmp_path, "--steps", STEPS, "--trainer", "sft", *ADAPTER)
    printed = finetune(*arguments, "--gradient-checkpointing", "--graphs")
    assert "without CUDA graphs" not in printed
    before, after = _before_and_after(printed)
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


def test_a_run_that_does_not_fit_is_told_so_before_it_starts(finetune, whole, text, tmp_path):
    arguments = ("--model", whole / "small-qwen3-moe", "--dataset", text, "--output", tmp_path)
    printed = finetune(*arguments, "--gpu-memory", "0.5", code=1)
    assert "4096 tokens per sequence: does not fit in 0.5 GiB." in printed
    assert "The run does not fit: lower --seq-len, --batch-size or --expert-rank." in printed
    assert not list(tmp_path.iterdir())


def test_a_run_that_fits_without_graphs_is_told_so(whole, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import finetune

    model = ("--model", str(whole / "small-qwen3-moe"), "--seq-len", "2048")

    def peak(graphs: str) -> float:
        plan = finetune.check(finetune.parse([*model, graphs, "--keep", "--gpu-memory", "80"]))
        return plan.peak / 2**30

    assert peak("--no-graphs") < peak("--graphs")
    between = str((peak("--no-graphs") + peak("--graphs")) / 2)
    assert finetune.check(finetune.parse([*model, "--no-graphs", "--gpu-memory", between])).fits
    with pytest.raises(SystemExit, match=r"does not fit: lower --seq-len.*\. It fits with --no-graphs\."):
        finetune.check(finetune.parse([*model, "--graphs", "--gpu-memory", between]))
    fits_alone = str(peak("--graphs") * 1.001)
    with pytest.raises(SystemExit, match=r"does not fit: .* It fits with --keep and nothing after it\."):
        finetune.check(finetune.parse([*model, "--graphs", "--keep", "experts", "--gpu-memory", fits_alone]))
    with pytest.raises(SystemExit, match=r"It fits with --no-graphs\."):
        finetune.check(finetune.parse([*model, "--graphs", "--keep", "experts", "--gpu-memory", between]))


def test_graphs_keep_what_is_sure_to_fit_attention_first(whole, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import finetune

    model = ("--model", str(whole / "small-qwen3-moe"), "--seq-len", "2048", "--graphs")

    def plan(*arguments: str):
        return finetune.check(finetune.parse([*model, *arguments]))

    monkeypatch.setattr("memory.host_has", lambda size: not size)
    both, projections = ("attention", "experts"), ("o_proj", "k_proj", "v_proj", "q_proj")
    choices = [(), ("attention",), both, (*both, *projections)]
    instead = [("k_proj",), ("attention", *projections), (*both, *projections[:3])]  # without what a choice ends with
    peaks = [plan("--gpu-memory", "80", "--keep", *keep).peak / 2**30 for keep in choices]
    assert peaks == sorted(set(peaks))
    for peak, keep, less in zip(peaks[1:], choices[1:], instead):
        assert plan("--gpu-memory", str(peak * 1.0301)).step.keep == keep
        assert plan("--gpu-memory", str(peak * 1.0299)).step.keep == less
        assert plan("--gpu-memory", str(peak * 1.01), "--keep", *keep).step.keep == keep
    with pytest.raises(SystemExit):
        finetune.parse(["--keep", "attention", "--no-graphs"])


OFFLOADING_TAKES_LESS = (
    " --keep attention experts o_proj k_proj v_proj q_proj --offload attention experts o_proj k_proj v_proj q_proj"
    " takes less of the GPU, and of the host instead."
)
NOTHING_KEPT_TAKES_LESS = " --keep and nothing after it takes less, --no-graphs less still."


@pytest.mark.parametrize(
    ("chosen", "hint"),
    [
        (["--no-graphs"], ""),
        (["--graphs", "--keep"], " --no-graphs takes less, too."),
        (["--graphs"], OFFLOADING_TAKES_LESS + NOTHING_KEPT_TAKES_LESS),
        (["--graphs", "--keep", "experts", "--offload", "experts"], NOTHING_KEPT_TAKES_LESS),
    ],
    ids=str,
)
def test_out_of_memory_says_what_to_lower(whole, text, tmp_path, kernel_dir, monkeypatch, chosen, hint):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import finetune

    class Full:
        def add_callback(self, _) -> None:
            pass

        def evaluate(self) -> dict:
            return {"eval_loss": 1.0}

        def train(self, **_) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(finetune, "make_trainer", lambda *_: Full())
    model = ("--model", str(whole / "small-qwen3-moe"), "--output", str(tmp_path), "--kernel", str(kernel_dir))
    options = finetune.parse([*model, "--dataset", str(text), "--seq-len", "32", "--gpu-memory", "2", *chosen])
    wanted = rf"(?s)Tried to allocate.*Out of memory: lower --seq-len.*fit: \d+ tokens\.{hint}$"
    with pytest.raises(SystemExit, match=wanted):
        finetune.train(options)


def _before_and_after(printed: str) -> tuple[float, float]:
    """The held-out losses of the final table."""
    return tuple(float(re.search(rf"loss {word}, held-out text +(\S+)", printed)[1]) for word in ("before", "after"))


def _losses(output: Path) -> list[tuple[int, str, float]]:
    """(step, which, value) of every loss and gradient norm in the training log of the last checkpoint."""
    history = json.loads((output / "checkpoints" / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    kinds = ("loss", "eval_loss", "grad_norm")
    return [(entry["step"], kind, entry[kind]) for entry in history["log_history"] for kind in kinds if kind in entry]
