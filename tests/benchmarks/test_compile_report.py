"""The report on absent cards: every kernel is compiled for them, fits, and leaves no register hazard."""

import json
import multiprocessing
import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
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
        /*0040*/                   {write} ;
        /*0050*/              @P0  BRA `(.L_x_1) ;
        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0070*/                   PRMT R26, R8, R9, R10 ;
"""
OUT_OF_LINE = """
        /*0010*/                   HGMMA.64x32x16.F32.BF16 R40, R24, gdesc[UR4], R40, gsb0 ;
        /*0020*/              @!P1 BRA `(.L_x_2) ;
        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0040*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0050*/                   {first} ;
.L_x_3:
        /*0060*/                   LDSM.16.M88.4 R24, [R2+UR8+0x600] ;
        /*0070*/                   EXIT ;
        /*0080*/                   MOV R24, RZ ;
"""


@pytest.mark.parametrize(
    ("between", "write", "overwrites"),
    [
        ("NOP", "PRMT R25, R8, R9, R10", 1),
        ("NOP", "LDSM.16.M88.4 R22, [R2+UR8+0x600]", 1),
        ("NOP", "SHFL.BFLY PT, R24, R51, 0x4, 0x1f", 1),
        ("NOP", "PRMT R28, R8, R9, R10", 1),  # no operand: the next write is the one that begins the loop
        ("WARPGROUP.DEPBAR.LE gsb0, 0x0", "PRMT R25, R8, R9, R10", 0),
        ("WARPGROUP.DEPBAR.LE gsb0, 0x1", "PRMT R25, R8, R9, R10", 1),  # leaves this product open
    ],
)
def test_a_write_before_the_wait_is_a_hazard(between, write, overwrites):
    products, early = sass.register_hazards(LOOP.format(between=between, write=write))
    assert products == 1 and len(early) == overwrites


@pytest.mark.parametrize(("first", "overwrites"), [("NOP", 1), ("WARPGROUP.DEPBAR.LE gsb0, 0x0", 0)])
def test_every_way_from_a_product_is_followed(first, overwrites):
    products, early = sass.register_hazards(OUT_OF_LINE.format(first=first))
    assert products == 1 and [line.split()[0] for line in early] == ["LDSM.16.M88.4"] * overwrites


@pytest.mark.parametrize(
    ("instruction", "first", "count"),
    [
        ("LDSM.16.M88.4 R96, [R2+UR8+0x600]", 96, 4),
        ("LDSM.16.MT88.4 R44, [R7+0x4000]", 44, 4),
        ("LDSM.16.MT88.2 R44, [R7+0x4000]", 44, 2),
        ("SHFL.BFLY PT, R80, R51, 0x4, 0x1f", 80, 1),
        ("SHFL.UP PT, R64, R59, 0x4, RZ", 64, 1),
        ("@!P1 LDG.E.128 R100, desc[UR12][R26.64]", 100, 4),
        ("@!P6 LDG.E.64 R78, desc[UR8][R76.64]", 78, 2),
        ("LDG.E.U16 R184, desc[UR12][R184.64]", 184, 1),
        ("LDS.128 R144, [R14+UR8+0x1c00]", 144, 4),
        ("LDS.64 R16, [R108+0x8000]", 16, 2),
        ("LDC.64 R58, c[0x0][0x238]", 58, 2),
        ("CS2R R72, SRZ", 72, 2),
        ("IMAD.WIDE.U32 R38, R38, UR5, RZ", 38, 2),
        ("IMAD.HI.U32 R3, R3, R49, RZ", 3, 1),
        ("SHF.R.S64 R7, R7, 0x6, R8", 7, 1),
        ("HMMA.16816.F32.BF16 R36, R20, R4, R36", 36, 4),
        ("HFMA2.MMA R79, -RZ, RZ, 0, 0", 79, 1),
        ("HMUL2.BF16_V2 R9, R13, R8.reuse.H0_H0", 9, 1),
        ("F2FP.BF16.F32.PACK_AB R107, R85, R84", 107, 1),
        ("IADD3 R46, P0, R21, UR4, RZ", 46, 1),
        ("P2R R32, PR, RZ, 0x1", 32, 1),
        ("ISETP.EQ.U32.AND P0, PT, R220, RZ, !P0", 0, 0),
        ("UIADD3.64 UR26, UR10, 0x20, URZ", 0, 0),
        ("STS.128 [R13+UR4+0x80], R20", 0, 0),
        ("LDGSTS.E.BYPASS.128 [R19+0x7800], desc[UR16][R34.64+0x80]", 0, 0),
        ("HGMMA.64x64x16.F32.BF16 R56, R88, gdesc[UR20], R56", 0, 0),
    ],
)
def test_the_registers_that_instructions_write(instruction, first, count):
    assert sass.written(instruction) == set(range(first, first + count))


@pytest.mark.parametrize(
    ("arch", "record", "fails"),
    [
        (86, {"shared_kib": 99}, False),
        (86, {"shared_kib": 99.5}, True),
        (90, {"shared_kib": 227, "hazards": []}, False),
        (90, {"shared_kib": 1, "hazards": ["NOP"]}, True),
        (100, {"shared_kib": 1, "tensor_memory": 512}, False),
        (100, {"shared_kib": 1, "tensor_memory": 1024}, True),
    ],
)
def test_what_the_report_fails_on(arch, record, fails):
    assert compile_report.fails(arch, record) == fails


def linear_products(kernel_dir: Path) -> set[tuple]:
    """What the report would compile, in a process that this does not change: of dense weights, decoded or not, each
    layer's (name, whether of a run of experts, W_ROWS, whether with adapters)."""
    found = set()

    class Noting(compile_report.Compiler):
        def __call__(self, kernel, grid, num_warps, num_stages, pointers, counts, *constants, fp_fusion=True):
            named = dict(zip([param.name for param in kernel.params], (*pointers, *counts, *constants)))
            if kernel.__name__ == "_linear_kernel" and named["FORMAT"] is None:
                found.add((self.layer, named["offsets"] is not None, named["W_ROWS"], named["LORA"] is not None))

    compile_report.Compiler = Noting
    compile_report.compile_card(90, compile_report.parse(["--kernel", str(kernel_dir)]))
    return found


def test_products_of_all_experts_and_of_runs_of_them_are_compiled(kernel_dir):
    """Both ways round. In runs are the decoded experts of each layer in 4 bit."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(linear_products, kernel_dir).result()
    assert found == {
        (name, layer.quant_type is not None, w_rows, layer.factors is not None)
        for name, layer in compile_report.LAYERS.items()
        for w_rows in (True, False)
    }


@pytest.fixture(scope="module")
def compiled(kernel_dir, tmp_path_factory) -> Path:
    """A folder with the report, and Triton's cache of what it has compiled."""
    folder = tmp_path_factory.mktemp("report")
    layers = ["nf4 bf16", "nf4 bf16 adapters"]
    arguments = ["--kernel", kernel_dir, "--out", folder, "--arch", "86", "90", "--rows", "1", "128"]
    done = subprocess.run(
        [sys.executable, SCRIPT, *arguments, "--layers", *layers, *SMALL],
        capture_output=True, text=True, cwd=SCRIPT.parent, env={**os.environ, "TRITON_CACHE_DIR": str(folder)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_layer_compiles_for_cards_that_are_not_here(compiled):
    report = json.loads((compiled / "compile_report.json").read_text())
    cards = report["cards"]
    assert report["command"].endswith(" ".join(SMALL)) and report["kernel"]["id"].startswith("_qwen3_moe_fused")
    assert cards.keys() == {"sm_86", "sm_90"}
    for records in cards.values():
        by_layer = {layer: {r["kernel"] for r in records if r["layer"] == layer} for layer in report["layers"]}
        products = {"gate_up_kernel", "linear_kernel", "down_backward_kernel"}
        assert by_layer["nf4 bf16"] >= products | {"gemv_kernel"}
        assert by_layer["nf4 bf16 adapters"] >= products | {"low_rank_kernel", "factor_grads_kernel", "repack_kernel"}
        assert {record.get("way") for record in records} >= {"fast"}
        assert all(0 <= record["shared_kib"] <= 99 and record["registers"] > 0 for record in records)
    assert sum(record["register_products"] for record in cards["sm_90"]) > 50


def test_nvdisasm_agrees_on_what_is_written(compiled):
    """Its life ranges, of kernels with less than 255 registers, have ^ or x where a register is written."""
    instructions = 0
    for cubin in (*machine_code(compiled, "low_rank_kernel"), *machine_code(compiled, "factor_grads_kernel")):
        for line in sass.tool("nvdisasm", "-c", "-lrm", "narrow", cubin=cubin).splitlines():
            found = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;\s+// \|\s*\d* ([^|]*)", line)
            if found and not found[1].startswith("HGMMA"):
                instructions += 1
                assert sass.written(found[1]) == {register for register, mark in enumerate(found[2]) if mark in "^x"}
    assert instructions > 5000


def test_without_waits_the_kernels_would_have_hazards(compiled):
    """Products that decode into registers wait for themselves, and it would be seen if they did not."""
    listings = [sass.tool("nvdisasm", "-c", cubin=cubin) for cubin in machine_code(compiled, "_linear_kernel")]
    early = [sass.register_hazards(re.sub(r"WARPGROUP\.DEPBAR\S+ gsb0, \S+", "NOP", each))[1] for each in listings]
    assert any(early)


def machine_code(folder: Path, kernel: str) -> list[bytes]:
    found = [file.read_bytes() for file in folder.rglob(f"{kernel}.cubin")]
    assert found
    return found
