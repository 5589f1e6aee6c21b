"""examples/demo.py, which `make demo` runs: an adapter of attention and experts, saved, loaded and converted."""

import re
import sys

import bitsandbytes as bnb
import pytest
from safetensors.torch import load_file

from qwen3_moe_integration.convert import layout_of, read_adapter
from tests.conftest import ROOT
from tests.documents import in_own_process
from tests.examples.runs import before_and_after

SMALL = ("--steps", "16", "--seq-len", "32", "--batch-size", "2", "--rank", "2", "--expert-rank", "3")
WEIGHTS = r"((q|k|v|o)_proj\.weight|experts\.(gate_up|down)_proj)"
LAYERS, LOADS = 3, 3  # one to train, one with the adapter as saved, one with an adapter an expert


def run_demo(arguments: list[str]) -> None:
    """Runs the demo, and says of each model that it loads how many weights are in 4 bit and how many should be."""
    sys.path.insert(0, str(ROOT / "examples"))
    import demo

    load = demo.finetune.load_base

    def said(*arguments):
        model = load(*arguments)
        weights = [p for name, p in model.named_parameters() if re.search(f"{WEIGHTS}$", name)]
        packed = [
            p for p in weights if isinstance(p, bnb.nn.Params4bit) and 2 * p.nbytes == p.quant_state.shape.numel()
        ]
        print(f"\nloaded {len(packed)} of {len(weights)} weights in 4 bit")
        return model

    demo.finetune.load_base = said
    demo.main(arguments)


def test_the_loss_falls_in_4_bit_and_the_adapter_goes_through_files_and_layouts(kernel_dir, tmp_path):
    text, output = tmp_path / "notes.txt", tmp_path / "demo"
    text.write_text("A grouped product multiplies every row by the matrix of its own expert. " * 60)
    environment = {"LOCAL_KERNELS": f"org/qwen3-moe-fused={kernel_dir}", "HF_HUB_OFFLINE": "1"}
    output.mkdir()
    arguments = ["--output", str(output), "--dataset", str(text), *SMALL]
    in_own_process(run_demo, arguments, folder=output, environment=environment)
    printed = output.with_suffix(".log").read_text()
    before, after = before_and_after(printed)
    assert after < before - 0.5, "16 steps take it from 8.0 to 6.9"
    every = f"loaded {6 * LAYERS} of {6 * LAYERS} weights in 4 bit"
    assert re.findall(r"^loaded .*", printed, re.MULTILINE) == LOADS * [every]
    distances = dict(re.findall(r"^(.+): outputs differ from the trained model's by (\S+) of", printed, re.MULTILINE))
    assert float(distances["saved and loaded"]) == 0 and float(distances["one adapter an expert"]) < 1e-4
    layouts = [
        layout_of(load_file(output / name / "adapter_model.safetensors")) for name in ("model", "model-per-expert")
    ]
    assert layouts == ["peft", "per-expert"]
    factors = read_adapter(output / "model")
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
