"""examples/demo.py, which `make demo` runs: an adapter of attention and experts, saved, loaded and converted."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from qwen3_moe_integration.convert import layout_of, read_adapter

ROOT = Path(__file__).resolve().parents[2]


def test_the_adapter_goes_through_files_and_layouts(kernel_dir, tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("A grouped product multiplies every row by the matrix of its own expert. " * 60)
    small = ("--steps", "4", "--seq-len", "32", "--batch-size", "2", "--rank", "2", "--expert-rank", "3")
    environment = os.environ | {
        "LOCAL_KERNELS": f"org/qwen3-moe-fused={kernel_dir}",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "integration"), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, ROOT / "examples" / "demo.py", "--output", tmp_path, "--dataset", text, *small]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"
    distances = dict(
        re.findall(r"^(.+): outputs differ from the trained model's by (\S+) of", ran.stdout, re.MULTILINE)
    )
    assert float(distances["saved and loaded"]) == 0 and float(distances["one adapter an expert"]) < 1e-4
    layouts = [
        layout_of(load_file(tmp_path / name / "adapter_model.safetensors")) for name in ("model", "model-per-expert")
    ]
    assert layouts == ["peft", "per-expert"]
    factors = read_adapter(tmp_path / "model")
    assert factors.config["r"] == 3 and factors.config["rank_pattern"]["q_proj"] == 2


def test_a_demo_starts_anew_and_removes_nothing_of_other_runs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import demo

    monkeypatch.chdir(tmp_path)
    own, others = demo.OUTPUT / "checkpoints", tmp_path / "outputs" / "finetune" / "checkpoints"
    for folder in (own, others):
        folder.mkdir(parents=True)

    def train(options):
        raise InterruptedError

    monkeypatch.setattr(demo.finetune, "train", train)
    for arguments, left in ((["--resume"], True), (["--output", str(others.parent)], True), ([], False), ([], False)):
        with pytest.raises(InterruptedError):
            demo.main(arguments)
        assert own.exists() is left and others.exists()
