"""parts.py: a row that a CPU can run trains, and what each row replaces is another thing."""

import json
import re

import pytest

pytest.importorskip("bitsandbytes")


def test_a_row_trains_and_is_written(kernel_dir, tmp_path):
    import parts

    sizes = ["--tiny", "--layers", "1", "--tokens", "16", "24", "--steps", "4"]
    parts.main([*sizes, "--kernel", str(kernel_dir), "--out", str(tmp_path)])
    result = json.loads((tmp_path / "parts.json").read_text())
    (row,) = result["rows"]
    assert [run["tokens"] for run in row["runs"]] == [16, 24] and "Transformers'" in row["what"]
    assert all(run["last_loss"] < run["first_loss"] for run in row["runs"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", result["environment"]["date"])
    cells = " | ".join(f"{run['step_ms']:.1f} | 0.00" for run in row["runs"])
    assert f"| {row['what']} | {cells} |" in (tmp_path / "parts.md").read_text()


def test_rows_differ_and_what_liger_replaces_for_good_comes_first():
    import parts
    import train_step

    kinds = [(train_step.kind(train_step.parse(row.flags)), row.around, row.waits) for row in parts.ROWS]
    assert len({*kinds}) == len(kinds) == len({row.what for row in parts.ROWS})
    with_liger = [train_step.parse(row.flags).liger for row in parts.ROWS]
    assert with_liger == sorted(with_liger) and not with_liger[0] and with_liger[-1]
