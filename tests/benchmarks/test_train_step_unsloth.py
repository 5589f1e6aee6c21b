"""train_step_unsloth.py, with a stand-in for Unsloth: the same step on its experts and on the kernel."""

import json

import pytest

from tests.documents import ROOT, call_main, in_own_process

SIZES = ["--tiny", "--layers", "1", "--tokens", "16", "24", "--steps", "3", "--rank", "2", "--profile", "16"]


def test_both_train_the_same_adapters_from_the_same_loss(kernel_dir, tmp_path):
    arguments = [ROOT / "benchmarks/train_step_unsloth.py", *SIZES, "--checkpoints", tmp_path, "--out", tmp_path]
    for kernel in ([], ["--kernel", kernel_dir]):
        in_own_process(call_main, *arguments, *kernel, folder=tmp_path, environment={})
    theirs, ours = (
        json.loads((tmp_path / f"train_step-1-layers-unsloth{name}.json").read_text()) for name in ("", "-kernel")
    )
    assert (theirs["experts"], ours["experts"]) == ("Unsloth", "this kernel")
    experts, attention = 2 * 8 * ((64 + 2 * 64) + (64 + 64)), 2 * 4 * (64 + 64)
    assert theirs["trained_parameters"] == ours["trained_parameters"] == experts + attention
    assert [run["tokens"] for run in ours["runs"]] == [16, 24]
    for each in (theirs, ours):
        assert each["runs"][0]["first_loss"] == pytest.approx(6.24, abs=0.5) and each["runs"][0]["step_ms"] > 0
    decoders = [
        {row["name"] for row in each["profile"]["kernels"]} & {"bitsandbytes::dequantize_4bit"}
        for each in (theirs, ours)
    ]
    assert decoders[0] and not decoders[1], "the kernel decodes by itself"
    assert sorted(path.name for path in tmp_path.glob("qwen3-moe*")) == ["qwen3-moe-1-layers-tiny"]
