"""Runs of examples/finetune.py that are killed, or find the disk full, and go on from a checkpoint."""

import errno
import os
import shutil

import pytest
import torch

from tests.conftest import ROOT
from tests.examples.runs import ADAPTER, STEPS, WHOLE, kill_after_a_checkpoint, losses_of


@pytest.mark.parametrize("trained", ["whole", "adapter"])
def test_a_killed_run_resumes_to_the_same_losses(finetune, text, request, tmp_path, trained):
    """Killed in the second epoch, while it wrote its next checkpoint, and again: neither is complete, and neither may
    take the place of one that is, of which the Trainer keeps two."""
    uninterrupted = request.getfixturevalue(trained)
    (tmp_path / "small-qwen3-moe").symlink_to(request.getfixturevalue("whole") / "small-qwen3-moe")
    for step in (18, 19):
        (tmp_path / "checkpoints" / f"checkpoint-{step}").mkdir(parents=True)
    (tmp_path / "checkpoints" / "checkpoint-19" / "trainer_state.json").write_text('{"global_step": 19, "log_hist')
    (tmp_path / "checkpoints" / "checkpoint-16").symlink_to(uninterrupted / "checkpoints" / "checkpoint-16")
    settings = WHOLE if trained == "whole" else ADAPTER
    printed = finetune("--dataset", text, "--output", tmp_path, "--steps", STEPS, "--resume", *settings)
    assert "missing keys" not in printed
    want, got = losses_of(uninterrupted), losses_of(tmp_path)
    assert sum(step > 16 for step, _, _ in want) >= 3
    assert got == want
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert left == {"checkpoint-16", f"checkpoint-{STEPS}"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="losses with and without checkpointing are compared bit by bit")
def test_a_run_that_is_killed_goes_on_in_graphs_too(start, finetune, text, whole, adapter, tmp_path):
    """On a CPU graphs give way to usual checkpointing, and that is said."""
    (tmp_path / "small-qwen3-moe").symlink_to(whole / "small-qwen3-moe")
    graphs = ("--gradient-checkpointing", "--graphs")
    arguments = ("--dataset", text, "--output", tmp_path, "--steps", STEPS, *ADAPTER, *graphs)
    kill_after_a_checkpoint(start(*arguments), tmp_path)
    printed = finetune(*arguments, "--resume")
    assert printed.count("is checkpointed without CUDA graphs: it runs on cpu") == 1
    assert "going on from" in printed and losses_of(tmp_path) == losses_of(adapter)


@pytest.mark.gpu
def test_a_killed_run_of_a_model_of_yours_goes_on_in_graphs(start, finetune, text, whole, tmp_path):
    """To the bit, with experts that wait in host memory and Adam's states in 8 bit: the step after a checkpoint is
    launched kernel by kernel again, in the other run by graphs."""
    steps = 40  # enough that the kill comes before the end
    model = ("--model", whole / "small-qwen3-moe", "--dataset", text, "--steps", steps, "--lr", 3e-3, *ADAPTER)
    kept = ("--graphs", "--keep", "attention", "experts", "--offload", "experts")
    outputs = tmp_path / "uninterrupted", tmp_path / "killed"
    runs = [(*model, *kept, "--output", output) for output in outputs]
    finetune(*runs[0])
    kill_after_a_checkpoint(start(*runs[1]), outputs[1])
    printed = finetune(*runs[1], "--resume")
    assert "going on from" in printed and "without CUDA graphs" not in printed
    want, got = (losses_of(output, steps) for output in outputs)
    assert got == want and len(want) >= steps // 4


@pytest.mark.parametrize("fails", ["adapter_model.safetensors", "optimizer.pt"])
def test_a_full_disk_keeps_the_last_checkpoint_and_that_is_said(finetune, text, whole, adapter, tmp_path, fails):
    """A file that may grow no further fails in the middle of its writing, as it does on a full disk."""
    (tmp_path / "small-qwen3-moe").symlink_to(whole / "small-qwen3-moe")
    good = tmp_path / "checkpoints" / "checkpoint-16"
    shutil.copytree(adapter / "checkpoints" / "checkpoint-16", good)
    before = {path.name: path.read_bytes() for path in good.iterdir()}
    weights, states = (len(before[name]) for name in ("adapter_model.safetensors", "optimizer.pt"))
    most = {"adapter_model.safetensors": weights // 2, "optimizer.pt": (weights + states) // 2}[fails]
    printed = finetune(
        "--dataset", text, "--output", tmp_path, "--steps", STEPS, "--resume", *ADAPTER, code=1, most=most
    )
    assert f"Nothing more could be written to {tmp_path}, as on a full disk" in printed and "Traceback" not in printed
    assert f"{good} is complete: make room, then --resume.\n" in printed
    broken = tmp_path / "checkpoints" / f"checkpoint-{STEPS}"
    assert (fails == "optimizer.pt") == (broken / "adapter_model.safetensors").exists()
    assert broken.exists() and not (broken / "trainer_state.json").exists()
    assert {path.name: path.read_bytes() for path in good.iterdir()} == before
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("resumable", [True, False])
def test_what_says_that_a_disk_is_full_is_told_from_what_does_not(tmp_path, monkeypatch, resumable):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from checkpoints import full_disk_explained

    folder, left = tmp_path / "checkpoints" / "checkpoint-8", "No checkpoint is complete yet."
    if resumable:
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text('{"global_step": 8}')
        left = f"{folder} is complete: make room, then --resume."
    for number in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        with pytest.raises(SystemExit) as stopped, full_disk_explained(tmp_path):
            raise OSError(number, os.strerror(number))
        assert str(stopped.value).endswith(left) and os.strerror(number) in str(stopped.value)
    for other in (OSError(errno.EACCES, os.strerror(errno.EACCES)), RuntimeError("shapes"), SystemExit("said before")):
        with pytest.raises(type(other)) as passed, full_disk_explained(tmp_path):
            raise other
        assert passed.value is other


def test_what_is_removed_is_what_the_trainer_left_half_written(tmp_path, monkeypatch):
    """Not a copy of a checkpoint, which has its step, nor anything else that a user has put beside them."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from checkpoints import complete_checkpoints, remove_incomplete

    folder = tmp_path / "checkpoints"
    for name in ("checkpoint-8", "checkpoint-8-best", "checkpoint-12", "checkpoint-16", "checkpoint-notes", "other"):
        (folder / name).mkdir(parents=True)
        (folder / name / "weights").write_text(name)
    for name in ("checkpoint-8", "checkpoint-8-best"):
        (folder / name / "trainer_state.json").write_text('{"global_step": 8}')
    (folder / "checkpoint-16" / "trainer_state.json").write_text('{"global_step": 1')
    assert complete_checkpoints(folder) == {8: folder / "checkpoint-8"}
    remove_incomplete(tmp_path)
    kept = {"checkpoint-8", "checkpoint-8-best", "checkpoint-notes", "other"}
    assert {path.name for path in folder.iterdir()} == kept
    assert all((folder / name / "weights").read_text() == name for name in kept)


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
