"""model_error.py: both errors are reported, and the script fails where the kernel's are larger beyond chance."""

import json

import pytest
import torch
from torch import nn

from qwen3_moe_integration import kernelize_model
from tests.conftest import ROOT
from tests.integration.models import ExpertsCalls

KINDS = ["logits", "gradients of experts", "gradients of routers", "gradients of the rest"]
SEEDS, LAYERS = 4, 2
ARGUMENTS = ["--tiny", "--seeds", str(SEEDS), "--layers", str(LAYERS), "--seq-len", "24", "--stock", "eager"]


@pytest.fixture
def model_error():
    import model_error

    return model_error


def test_both_errors_of_every_seed_are_reported(model_error, kernel_dir, tmp_path):
    arguments = [*ARGUMENTS, "--kernel", str(kernel_dir)]
    with ExpertsCalls() as calls:
        model_error.main([*arguments, "--out", str(tmp_path)])
    assert (calls.forward, calls.backward) == (SEEDS * LAYERS, SEEDS * LAYERS), "stock and reference run without it"
    result = json.loads((tmp_path / "model_error.json").read_text())
    assert result["command"] == " ".join(["python benchmarks/model_error.py", *arguments])
    assert result["kernel"]["id"].startswith("_qwen3_moe_fused")
    assert list(result["errors"]) == list(result["summary"]) == KINDS
    table = (tmp_path / "model_error.md").read_text()
    for kind, sides in result["errors"].items():
        ours, theirs = sides["kernel"], sides["stock"]
        assert len({*ours, *theirs}) == 2 * SEEDS and all(1e-3 < error < 3e-2 for error in (*ours, *theirs))
        summary = result["summary"][kind]
        assert summary["kernel_mean"] == pytest.approx(sum(ours) / SEEDS) and summary["stock_worst"] == max(theirs)
        assert f"| {kind} | {summary['kernel_mean']:.3e} ({max(ours):.3e}) | {summary['stock_mean']:.3e} " in table


def test_an_error_is_measured_against_fp64_and_not_against_the_other(model_error):
    """What is measured is that of the tensors taken as one vector."""
    want = {"logits": [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]}
    got = {"logits": [torch.tensor([3.0, 0.6]), torch.tensor([[4.8]])]}
    assert model_error.distances(got, want) == pytest.approx({"logits": 0.2})


def test_a_kernel_that_rounds_its_results_once_more_fails(model_error, kernel_dir, tmp_path, monkeypatch):
    """To fp8, which has four bits less than bf16."""

    def rounding(model: nn.Module, *arguments) -> nn.Module:
        for layer in kernelize_model(model, *arguments).model.layers:
            layer.mlp.register_forward_hook(lambda module, inputs, out: out.to(torch.float8_e4m3fn).to(out.dtype))
        return model

    monkeypatch.setattr(model_error, "kernelize_model", rounding)
    with pytest.raises(SystemExit, match="further from fp64 than stock, beyond chance: logits"):
        model_error.main([*ARGUMENTS, "--kernel", str(kernel_dir), "--out", str(tmp_path)])
    assert (tmp_path / "model_error.json").exists(), "with what is wrong"


def test_chance_is_told_from_what_is_more(model_error):
    stock = [1.0, 1.1, 0.9, 1.0]
    as_far = model_error.summary({"kernel": [1.02, 1.08, 0.93, 1.01], "stock": stock})
    further = model_error.summary({"kernel": [1.02, 1.13, 0.93, 1.02], "stock": stock})
    nearer = model_error.summary({"kernel": [0.98, 1.07, 0.88, 0.99], "stock": stock})
    broken = model_error.summary({"kernel": [float("nan")] * 4, "stock": stock})
    kinds = {"as far": as_far, "further": further, "nearer": nearer, "broken": broken}
    assert model_error.further(kinds) == ["further", "broken"]


def test_the_committed_results_are_no_further_from_fp64_than_stock(model_error):
    for path in (ROOT / "benchmarks/results").rglob("model_error.json"):
        result = json.loads(path.read_text())
        assert list(result["errors"]) == list(result["summary"]) == KINDS
        for kind, sides in result["errors"].items():
            assert result["summary"][kind] == pytest.approx(model_error.summary(sides))
        assert not model_error.further(result["summary"]), path


def test_one_seed_alone_is_refused(model_error, capsys):
    with pytest.raises(SystemExit):
        model_error.parse(["--seeds", "1"])
    assert "--seeds must be at least 2" in capsys.readouterr().err
