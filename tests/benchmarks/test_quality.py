"""quality.py: the 4-bit paths agree, and the script fails where they do not."""

import json

import pytest
import torch
from torch import nn

from tests.conftest import ROOT

ARGUMENTS = ["--steps", "3", "--whole-steps", "2", "--batch-size", "2", "--seq-len", "256", "--rank", "2"]


@pytest.fixture
def quality(monkeypatch):
    import quality

    held = quality.tokenized
    monkeypatch.setattr(quality, "tokenized", lambda *arguments: held(*arguments)[:60])
    return quality


def test_both_ways_to_multiply_4_bit_weights_agree(quality, kernel_dir, tmp_path):
    arguments = [*ARGUMENTS, "--kernel", str(kernel_dir), "--out", str(tmp_path)]
    quality.main(arguments)
    result = json.loads((tmp_path / "quality.json").read_text())
    assert result["command"] == " ".join(["python benchmarks/quality.py", *arguments])
    assert result["kernel"]["id"].startswith("_qwen3_moe_fused")
    full, fused, by_bnb = result["perplexity"].values()
    assert fused == pytest.approx(by_bnb, rel=1e-4) and fused != pytest.approx(full, rel=1e-5)
    assert result["worst_difference"] < 1e-4 < result["difference_between_seeds"]
    assert [len(losses) for losses in result["losses"].values()] == [3, 3, 3]
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("folder", "device"), [("cpu", "cpu"), ("nvidia-h200", "cuda")])
def test_the_committed_results_pass_by_less_than_quantizing_changes(quality, folder, device):
    result = json.loads((ROOT / "benchmarks/results" / folder / "quality.json").read_text())
    full, fused, by_bnb = result["perplexity"].values()
    assert abs(fused / by_bnb - 1) < quality.PERPLEXITIES_AGREE < min(abs(fused / full - 1), abs(by_bnb / full - 1))
    assert result["worst_difference"] < quality.CURVES_AGREE[device] < 0.1 * result["difference_between_seeds"]


@pytest.mark.parametrize(
    ("spoiled_call", "message"), [(1, "perplexities in 4 bit differ"), (2, "the loss curves of the two paths")]
)
def test_weights_that_are_not_the_same_fail(quality, kernel_dir, tmp_path, monkeypatch, spoiled_call, message):
    """Decoded weights are asked for twice: for the perplexity, and for the loss curve."""
    load, models = quality.decoded, []

    def other_weights(*arguments) -> nn.Module:
        models.append(load(*arguments))
        if len(models) == spoiled_call:
            with torch.no_grad():
                models[-1].model.norm.weight.mul_(4.0)
        return models[-1]

    monkeypatch.setattr(quality, "decoded", other_weights)
    with pytest.raises(SystemExit, match=message):
        quality.main([*ARGUMENTS, "--kernel", str(kernel_dir), "--out", str(tmp_path)])
