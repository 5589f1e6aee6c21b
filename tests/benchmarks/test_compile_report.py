"""The report on absent cards: every kernel is compiled for them, fits, and leaves no register hazard."""

import json
import subprocess
import sys
from pathlib import Path

import compile_report
import pytest
from harness import sass

SCRIPT = Path(compile_report.__file__)
SMALL = ["--hidden", "256", "--intermediate", "128", "--experts", "8", "--top-k", "2"]

LOOP = """
.L_x_1:
        /*0010*/                   PRMT R24, R8, R9, R10 ;
        /*0020*/                   HGMMA.64x32x16.F32.BF16 R40, R24, gdesc[UR4], R40, gsb0 ;
        /*0030*/                   {between} ;
        /*0040*/                   PRMT R25, R8, R9, R10 ;
        /*0050*/              @P0  BRA `(.L_x_1) ;
"""


@pytest.mark.parametrize(("between", "overwrites"), [("NOP", 1), ("WARPGROUP.DEPBAR.LE gsb0, 0x0", 0)])
def test_a_write_before_the_wait_is_a_hazard(between, overwrites):
    (body,) = sass.loops(LOOP.format(between=between))
    assert len(sass.first_overwrite(body, 1, {24, 25, 26, 27})) == overwrites


def test_the_layer_compiles_for_cards_that_are_not_here(kernel_dir, tmp_path):
    arguments = ["--kernel", kernel_dir, "--out", tmp_path, "--arch", "86", "90", "--rows", "1", "128", *SMALL]
    done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, cwd=SCRIPT.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "compile_report.json").read_text())
    cards = report["cards"]
    assert report["command"].endswith(" ".join(SMALL)) and report["kernel"]["id"].startswith("_qwen3_moe_fused")
    assert cards.keys() == {"sm_86", "sm_90"}
    for records in cards.values():
        assert {"gate_up_kernel", "linear_kernel", "down_backward_kernel", "gemv_kernel"} <= {
            r["kernel"] for r in records
        }
        assert {record.get("way") for record in records} >= {"fast"}
        assert all(0 <= record["shared_kib"] <= 99 and record["registers"] > 0 for record in records)
    assert sum(record["register_products"] for record in cards["sm_90"]) > 50
