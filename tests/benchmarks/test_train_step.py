"""train_step.py: it trains, and its figures are of the steps that it ran."""

import json
from pathlib import Path

import pytest
import torch

from tests.host_syncs import host_syncs
from tests.integration import graphs
from tests.integration.models import tokens

pytest.importorskip("bitsandbytes")


def test_a_tiny_model_trains_and_is_measured(kernel, kernel_dir, tmp_path, capsys):
    import train_step

    arguments = ["--tiny", "--no-liger", "--layers", "2", "--tokens", "16", "24", "--steps", "4", "--profile", "16"]
    train_step.main([*arguments, "--kernel", str(kernel_dir), "--out", str(tmp_path)])
    result = json.loads((tmp_path / "train_step-2-layers-no-liger.json").read_text())
    assert result["kernel"]["id"] == json.loads(Path(kernel.__file__).with_name("metadata.json").read_text())["id"]
    assert [run["tokens"] for run in result["runs"]] == [16, 24]
    for run in result["runs"]:
        assert run["last_loss"] < run["first_loss"]
        assert run["tokens_per_second"] == pytest.approx(run["tokens"] / run["step_ms"] * 1e3)
    experts = 2 * 8 * 16 * ((64 + 2 * 64) + (64 + 64))
    attention = 2 * 16 * 4 * (64 + 64)
    assert result["trained_parameters"] == experts + attention
    assert result["profile"]["kernels"] and (tmp_path / "train_step-2-layers-no-liger.md").exists()


def test_a_step_asks_for_no_values(kernel_dir, monkeypatch):
    """On a GPU each answer would have to be waited for. Liger's loss, which a CPU cannot run, asks once."""
    import train_step

    graphs.stand_in(monkeypatch.setattr)
    options = train_step.parse(["--graphs", "--tiny", "--no-liger", "--layers", "2", "--kernel", str(kernel_dir)])
    model = train_step.build(options, train_step.config(2, **train_step.TINY), "cpu")
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], 1e-3
    )  # Adam counts on the host here
    step, ids = train_step.training_step(model, optimizer), tokens(1, 16)
    for _ in range(3):
        step(ids)
    files = host_syncs(monkeypatch)
    step(ids)
    assert graphs.recordings(model) == 2 and files == []


def test_graphs_alone_keep_what_they_are_asked_to(capsys):
    import train_step

    assert train_step.parse(["--graphs", "--keep", "attention", "experts"]).keep == ["attention", "experts"]
    with pytest.raises(SystemExit):
        train_step.parse(["--keep", "attention"])
    assert "add --graphs" in capsys.readouterr().err
    offloads = ["--graphs", "--keep", "experts", "--offload"]
    assert train_step.parse([*offloads, "experts"]).offload == ["experts"]
    with pytest.raises(SystemExit):
        train_step.parse([*offloads, "attention"])
    assert "name it in --keep too" in capsys.readouterr().err


def test_runs_that_differ_in_a_part_have_files_of_their_own():
    import train_step

    flags = ["--stock", "--no-liger", "--loss-chunk 1", "--peft-attention", "--compile", "--graphs"]
    flags += ["--graphs --keep attention", "--graphs --keep attention --offload attention", "--graphs --no-liger", ""]
    names = [train_step.kind(train_step.parse(each.split())) for each in flags]
    assert len({*names}) == len(names) and names[-2:] == ["-graphs-no-liger", ""]
    assert names[2] == "-loss-chunk-1" and names[7] == "-graphs-keep-attention-offload-attention"


def test_the_gpu_is_busy_where_something_runs_on_it():
    from harness.step import _covered

    spans = [(5.0, 6.0), (0.0, 2.0), (1.0, 1.5), (1.0, 3.0), (6.0, 6.5)]
    assert _covered(spans) == 3.0 + 1.5 and _covered([]) == 0.0


def test_what_is_offloaded_is_in_the_name_of_the_results(kernel_dir, tmp_path, monkeypatch):
    import train_step

    graphs.stand_in(monkeypatch.setattr)
    arguments = ["--tiny", "--no-liger", "--layers", "3", "--tokens", "16", "--steps", "4", "--kernel", str(kernel_dir)]
    results = []
    for more in ([], ["--offload", "experts"]):
        train_step.main([*arguments, "--graphs", "--keep", "experts", "o_proj", *more, "--out", str(tmp_path)])
        name = "-".join(["train_step-3-layers-graphs-keep-experts-o_proj", *more, "no-liger"]).replace("---", "-")
        results.append(json.loads((tmp_path / f"{name}.json").read_text())["runs"][0])
    kept, offloaded = results
    assert offloaded["last_loss"] == kept["last_loss"]
    assert offloaded["planned_gib"] < kept["planned_gib"]


def test_peft_s_own_adapters_of_attention_train_to_the_same_loss(kernel_dir, tmp_path):
    import train_step

    arguments = ["--tiny", "--no-liger", "--layers", "1", "--tokens", "16", "--steps", "3", "--kernel", str(kernel_dir)]
    for more in ([], ["--peft-attention"]):
        train_step.main([*arguments, *more, "--out", str(tmp_path)])
    names = ("train_step-1-layers-no-liger.json", "train_step-1-layers-no-liger-peft-attention.json")
    fused, own = (json.loads((tmp_path / name).read_text())["runs"][0] for name in names)
    assert fused["first_loss"] == pytest.approx(own["first_loss"], rel=1e-3)
    assert fused["last_loss"] == pytest.approx(own["last_loss"], rel=1e-2)


def test_stock_libraries_train_the_same_parameters_from_about_the_same_loss(kernel_dir, tmp_path):
    import train_step

    arguments = ["--tiny", "--no-liger", "--layers", "1", "--tokens", "16", "--steps", "2", "--out", str(tmp_path)]
    train_step.main([*arguments, "--stock"])
    train_step.main([*arguments, "--kernel", str(kernel_dir)])
    names = ("train_step-1-layers-no-liger.json", "train_step-1-layers-stock-no-liger.json")
    ours, stock = (json.loads((tmp_path / name).read_text()) for name in names)
    assert stock["stock"] and not ours["stock"]
    assert stock["trained_parameters"] == ours["trained_parameters"]
    assert stock["runs"][0]["first_loss"] == pytest.approx(ours["runs"][0]["first_loss"], rel=0.05)
