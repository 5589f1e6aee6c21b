"""quality.py: the 4-bit paths agree, and the script fails where they do not."""

import json

import pytest
import torch
from torch import nn

ARGUMENTS = ["--steps", "3", "--whole-steps", "2", "--batch-size", "2", "--seq-len", "256", "--rank", "2"]


@pytest.fixture
def quality(monkeypatch):
    import quality

    held = quality.tokenized
    monkeypatch.setattr(quality, "tokenized", lambda *arguments: held(*arguments)[:60])
    return quality


def test_both_ways_to_multiply_4_bit_weights_agree(quality, kernel_dir, tmp_path):
    quality.main([*ARGUMENTS, "--kernel", str(kernel_dir), "--out", str(tmp_path)])
    result = json.loads((tmp_path / "quality.json").read_text())
    full, fused, by_bnb = result["perplexity"].values()
    assert fused == pytest.approx(by_bnb, rel=1e-4) and fused != pytest.approx(full, rel=1e-5)
    assert result["worst_difference"] < 1e-4 < result["difference_between_seeds"]
    assert [len(losses) for losses in result["losses"].values()] == [3, 3, 3]
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")


def test_weights_that_are_not_the_same_fail(quality, kernel_dir, tmp_path, monkeypatch):
    load = quality.decoded

    def other_weights(*arguments) -> nn.Module:
        model = load(*arguments)
        with torch.no_grad():
            model.model.layers[0].mlp.experts.down_proj.mul_(2.0)
        return model

    monkeypatch.setattr(quality, "decoded", other_weights)
    with pytest.raises(SystemExit, match="perplexities in 4 bit differ"):
        quality.main([*ARGUMENTS, "--kernel", str(kernel_dir), "--out", str(tmp_path)])
