"""Compiles every kernel of a frozen experts layer for cards that are not here, and records what each takes.

The layer runs on empty tensors, with a launcher that compiles instead of launching: what is compiled is what the layer
would choose on such a card, from one row per expert to thousands, in each of LAYERS: nf4, fp4 and dense, bf16 and
fp16, with adapters and without. Shared and tensor memory must stay below what the card has, or a user meets
OutOfResources; and on Hopper nothing may overwrite a product's registers too early. Needs no GPU.

    python benchmarks/compile_report.py --out benchmarks/results
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import re
import shlex
import sys
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
import triton
from harness.environment import kernel_identity
from harness.files import write_whole
from harness.peers import load_kernel
from harness.sass import register_hazards, tool
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

CARDS = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""Compute capability and the KiB of shared memory a program may use."""
TENSOR_MEMORY = 512
"""Columns of it that a program may use on sm_100."""
TUNED = {90: ("NVIDIA H200",)}
"""Cards by name whose own tiles are compiled beside those that any card of their kind takes."""
ROWS = (0.0625, 1, 5, 8, 32, 128, 512, 2048)  # at 5, backward's tiles have few columns
RANK = 16


class Layer(NamedTuple):
    """What of a layer makes other kernels of the same tiles. ``quant_type`` is None for dense weights. ``factors`` is
    the dtype of adapters, None without; they lie in memory as PEFT stores them. ``halves`` 2 gives gate and up an A
    each."""

    quant_type: str | None
    dtype: torch.dtype
    nested: bool = True
    factors: torch.dtype | None = None
    dropout: float = 0.0
    halves: int = 1


BF16, FP16 = torch.bfloat16, torch.float16
LAYERS = {
    "nf4 bf16": Layer("nf4", BF16),
    "nf4 fp16": Layer("nf4", FP16),
    "fp4 bf16": Layer("fp4", BF16),
    "fp4 fp16": Layer("fp4", FP16),
    "nf4 bf16 adapters": Layer("nf4", BF16, factors=BF16),
    "nf4 fp16 adapters": Layer("nf4", FP16, factors=FP16),
    "fp4 bf16 adapters": Layer("fp4", BF16, factors=BF16),
    "fp4 fp16 adapters": Layer("fp4", FP16, factors=FP16),
    "bf16": Layer(None, BF16),
    "bf16 adapters": Layer(None, BF16, factors=BF16),
    "nf4 bf16 un-nested": Layer("nf4", BF16, nested=False),
    "nf4 bf16 adapters in fp32": Layer("nf4", BF16, factors=torch.float32),
    "nf4 bf16 adapters in halves, dropout": Layer("nf4", BF16, factors=BF16, dropout=0.05, halves=2),
}


class AbsentCard:
    """A Triton driver that only answers what the compiler asks."""

    utils = None

    def __init__(self, arch: int):
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        """A number of its own for each card: Triton remembers the target by it."""
        return self.target.arch

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


class Compiler:
    """Stands in for ``launch``: compiles each specialization once and keeps its resources."""

    def __init__(self, specialize):
        self.specialize, self.records = specialize, {}
        self.layer = ""

    def __call__(self, kernel, grid, num_warps, num_stages, pointers, counts, *constants, fp_fusion=True) -> None:
        args = (*pointers, *counts, *constants)
        key = (kernel.__name__, num_warps, num_stages, *self.specialize(pointers, counts, constants)[1])
        if key not in self.records:
            options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": fp_fusion}
            self.records[key] = {
                "layer": self.layer,
                "kernel": kernel.__name__.strip("_"),
                **blocks(kernel, args),
                "warps": num_warps,
                "stages": num_stages,
                **resources(kernel.warmup(*args, grid=grid, **options)),
            }


def blocks(kernel, args) -> dict:
    """The arguments that say which tile this is; of linear, whether it takes a run of the experts."""
    named = {param.name: arg for param, arg in zip(kernel.params, args)}
    record = {name: arg for name, arg in named.items() if re.fullmatch(r"BLOCK_[A-Z]|ROWS|N|K|I|H", name)}
    if "FORMAT" in named:
        record["way"] = named["FORMAT"][0] if named["FORMAT"] else "dense"
    if kernel.__name__ == "_linear_kernel":
        record["run"] = named["offsets"] is not None
    return record


def resources(compiled) -> dict:
    """KiB of shared memory, registers and spilled bytes per thread; on Hopper also the products that decode into
    registers, and what overwrites them too early; on sm_100 columns of tensor memory."""
    cubin = compiled.asm["cubin"]
    text = tool("cuobjdump", "-res-usage", cubin=cubin)
    registers, stack = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK"))
    record = {"shared_kib": compiled.metadata.shared / 1024, "registers": registers, "stack_bytes": stack}
    if compiled.metadata.target.arch == 90:
        record["register_products"], record["hazards"] = register_hazards(tool("nvdisasm", "-c", cubin=cubin))
    if compiled.metadata.target.arch == 100:
        record["tensor_memory"] = compiled.metadata.tmem_size
    return record


def fails(arch: int, record: dict) -> bool:
    """Whether a launch would, or might compute something else."""
    too_much = record["shared_kib"] > CARDS[arch] or record.get("tensor_memory", 0) > TENSOR_MEMORY
    return too_much or bool(record.get("hazards"))


def compile_card(arch: int, options: argparse.Namespace) -> list[dict]:
    """The kernels of all layers on one card, in a process that does nothing else: it changes the kernel package."""
    name = load_kernel(options.kernel.resolve()).__name__
    driver.set_active(AbsentCard(arch))
    modules = {
        file: importlib.import_module(f"{name}.kernels.{file}")
        for file in ("routing", "combine", "gate_up", "linear", "down_backward", "four_bit_fast", "dequantize", "gemv",
                     "weight_grad", "adapter", "product", "experts")
    }  # fmt: skip
    regime, tiling, projection, routed = (
        importlib.import_module(f"{name}.{file}") for file in ("regime", "tiling", "projection", "routed")
    )
    compiler = Compiler(importlib.import_module(f"{name}.kernels.launch").specialize)
    for module in modules.values():
        if hasattr(module, "launch"):
            module.launch = compiler
    for module in (regime, modules["dequantize"]):
        module.has_byte_permute = lambda device: True
    modules["product"]._has_tma = lambda device: arch >= 90
    modules["four_bit_fast"]._is_hopper = lambda device: arch == 90
    for card in (f"sm_{arch}", *TUNED.get(arch, ())):
        tiling._card = lambda device, card=card: (card, CARDS[arch] * 1024)
        regime.fast_rows.cache_clear()
        for compiler.layer in options.layers:
            before = len(compiler.records)
            run_layer(LAYERS[compiler.layer], projection, modules["experts"], routed, options)
            found = len(compiler.records) - before
            print(f"sm_{arch}, tiles of {card}: {compiler.layer}, {found} more kernels", flush=True)
    return list(compiler.records.values())


def run_layer(
    layer: Layer, projection: ModuleType, experts: ModuleType, routed: ModuleType, options: argparse.Namespace
) -> None:
    """Forward alone, forward and backward, and forward again by gradient checkpointing, at each number of rows."""
    hidden, width, top_k = options.hidden, options.intermediate, options.top_k
    gate_up, down = (
        projection.Projection(stack(layer, projection, *shape), adapter(layer, projection, *shape, halves))
        for *shape, halves in ((options.experts, 2 * width, hidden, layer.halves), (options.experts, hidden, width, 1))
    )
    wanted = projection.Gradients(True, True, False, False, *[layer.factors is not None] * 4)
    seed = torch.empty(1, dtype=torch.int64) if layer.dropout else None
    for rows in options.rows:
        tokens = max(1, int(rows * options.experts / top_k))
        x = torch.empty(tokens, hidden, dtype=layer.dtype)
        inputs = x, torch.empty(tokens, top_k, dtype=torch.int64), x.new_empty(tokens, top_k), gate_up, down, seed
        experts.experts_forward(*inputs, "silu", False)
        experts.experts_forward(*inputs, "silu", True, False)
        _, *saved = experts.experts_forward(*inputs, "silu", True)
        experts.experts_backward(x, *inputs, tuple(saved), "silu", wanted)
        *others, table = saved
        table = routed.sorted_part(table, tokens * top_k, options.experts)  # without a tile table, as by the op
        experts.experts_backward(x, *inputs, (*others, table), "silu", wanted)


def stack(layer: Layer, projection: ModuleType, experts: int, n: int, k: int):
    """Of whatever memory holds: nothing reads it."""
    if layer.quant_type is None:
        return torch.empty(experts, n, k, dtype=layer.dtype)
    size = experts * n * k
    data, code = torch.empty(size // 2, dtype=torch.uint8), torch.empty(16)
    if layer.nested:
        absmax, nested_blocksize = torch.empty(size // 64, dtype=torch.uint8), 256
        nested = torch.empty(size // 64 // 256), torch.empty(256), torch.empty(())
    else:
        absmax, nested_blocksize, nested = torch.empty(size // 64), 0, (None,) * 3
    return projection.FourBitWeight(
        data, absmax, code, *nested, (experts, n, k), 64, nested_blocksize, layer.quant_type, layer.dtype
    )


def adapter(layer: Layer, projection: ModuleType, experts: int, n: int, k: int, halves: int):
    """As PEFT stores it: of B, experts are fastest."""
    if layer.factors is None:
        return None
    A = torch.empty(experts, halves * RANK, k, dtype=layer.factors)
    B = torch.empty(n, RANK, experts, dtype=layer.factors).permute(2, 0, 1)
    return projection.Lora(A, B, 1.0, layer.dropout)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", type=Path, default=Path("."), help="folder that holds build/")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--rows", type=float, nargs="+", default=ROWS, help="rows per expert; below 1, some have none")
    parser.add_argument("--arch", type=int, nargs="+", default=list(CARDS), choices=list(CARDS))
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), choices=list(LAYERS), metavar="LAYER")
    parser.add_argument("--workers", type=int, default=2, help="cards compiled at a time (default: %(default)s)")
    for name, default in (("hidden", 2048), ("intermediate", 768), ("experts", 128), ("top-k", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args(argv)


def as_json(report: dict) -> str:
    """With a line for each kernel."""
    cards = [
        f"  {json.dumps(card)}: [\n   " + ",\n   ".join(map(json.dumps, records)) + "\n  ]"
        for card, records in report["cards"].items()
    ]
    head = json.dumps({field: value for field, value in report.items() if field != "cards"}, indent=1)
    return head.removesuffix("\n}") + ',\n "cards": {\n' + ",\n".join(cards) + "\n }\n}\n"


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    kernel = load_kernel(options.kernel.resolve())
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool:
        cards = dict(zip(options.arch, pool.map(partial(compile_card, options=options), options.arch)))
    report = {
        "command": shlex.join(["python", "benchmarks/compile_report.py", *argv]),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "kernel": kernel_identity(kernel),
        "shape": {field: getattr(options, field) for field in ("hidden", "intermediate", "experts", "top_k")},
        "rank": RANK,
        "rows": list(options.rows),
        "layers": options.layers,
        "cards": {f"sm_{arch}": records for arch, records in cards.items()},
    }
    write_whole(options.out / "compile_report.json", as_json(report))
    for arch, records in cards.items():
        shared, registers, stack = (
            max(record[field] for record in records) for field in ("shared_kib", "registers", "stack_bytes")
        )
        print(
            f"sm_{arch}: {len(records)} kernels, at most {shared:.1f} of {CARDS[arch]} KiB, {registers} registers, "
            f"{stack} bytes of stack"
        )
    failed = [(arch, record) for arch, records in cards.items() for record in records if fails(arch, record)]
    for arch, record in failed:
        print(f"sm_{arch} FAILS: {record}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
