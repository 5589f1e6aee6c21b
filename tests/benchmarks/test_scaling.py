"""scaling.py runs every engine, on two ranks as on GPUs; scaling_model.py gives the tables of docs/scaling.md."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("bitsandbytes")

from tests.conftest import ROOT
from tests.integration.distributed.ranks import run_on_ranks, start_server


def measure(arguments: list[str]) -> None:
    import scaling

    scaling.main(arguments)


def test_every_engine_trains_and_is_measured(kernel, kernel_dir, tmp_path):
    start_server()
    arguments = ["--tiny", "--layers", "2", "--tokens", "24", "--steps", "4", "--graphs"]
    run_on_ranks(2, measure, [*arguments, "--kernel", str(kernel_dir), "--out", str(tmp_path)])
    result = json.loads((tmp_path / "scaling.json").read_text())
    runs = {run["engine"]: run for run in result["runs"]}
    metadata = json.loads(Path(kernel.__file__).with_name("metadata.json").read_text())
    assert result["kernel"]["id"] == metadata["id"]
    assert result["command"].startswith("torchrun --nproc-per-node=2 benchmarks/scaling.py --tiny")
    assert [*runs] == ["alone", "ddp", "fsdp2", "experts", "whole", "ep"] and result["ranks"] == 2
    for run in runs.values():
        assert run["last_loss"] < run["first_loss"]
        assert run["tokens_per_second"] == pytest.approx(2 * 24 / run["step_ms"] * 1e3)
        base = runs[run["relative_to"]]["tokens_per_second"]
        assert run["efficiency"] == pytest.approx(run["tokens_per_second"] / base)
    for engine in ("fsdp2", "experts"):
        assert runs[engine]["last_loss"] == pytest.approx(runs["ddp"]["last_loss"], abs=1e-2)
    assert (tmp_path / "scaling.md").read_text().count("\n| ") == 2 + len(runs)


def test_the_model_s_tables_are_those_of_the_guide():
    import scaling_model

    assert scaling_model.tables() in (ROOT / "docs" / "scaling.md").read_text()


def test_more_gpus_are_never_worth_more_than_their_number():
    import scaling_model

    for block in re.findall(r"(?:^\|.*\n?)+", scaling_model.tables(), re.M):
        rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines()[2:]]
        assert [int(row[0]) for row in rows] == list(scaling_model.GPUS)
        for engine in (0, 1):
            speeds = [float(row[1 + 3 * engine].replace(",", "")) for row in rows]
            assert all(speed <= 1.001 * int(row[0]) * speeds[0] for speed, row in zip(speeds, rows, strict=True))
            assert all(int(row[2 + 3 * engine].rstrip("%")) <= 100 for row in rows)
