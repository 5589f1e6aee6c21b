"""Compiles every kernel of the 4-bit experts layer for cards that are not here, and records what each takes.

The layer runs on empty tensors, with a launcher that compiles instead of launching: what is compiled is what the layer
would choose on such a card, from one row per expert to thousands. Shared memory must stay below what the card has, or a
user meets OutOfResources; and on Hopper nothing may overwrite a product's registers too early. Needs no GPU.

    python benchmarks/compile_report.py --out benchmarks/results
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shlex
import sys
from pathlib import Path

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
ROWS = (0.0625, 1, 5, 8, 32, 128, 512, 2048)  # at 5, tiles of forward and backward have different heights


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

    def __call__(self, kernel, grid, num_warps, num_stages, pointers, counts, *constants, fp_fusion=True) -> None:
        args = (*pointers, *counts, *constants)
        key = (kernel.__name__, num_warps, num_stages, *self.specialize(pointers, counts, constants)[1])
        if key not in self.records:
            options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": fp_fusion}
            self.records[key] = {
                "kernel": kernel.__name__.strip("_"),
                **blocks(kernel, args),
                "warps": num_warps,
                "stages": num_stages,
                **resources(kernel.warmup(*args, grid=grid, **options)),
            }


def blocks(kernel, args) -> dict:
    """The arguments that say which tile this is."""
    named = {param.name: arg for param, arg in zip(kernel.params, args)}
    record = {name: arg for name, arg in named.items() if re.fullmatch(r"BLOCK_[A-Z]|N|K|I|H", name)}
    if "FORMAT" in named:
        record["way"] = named["FORMAT"][0] if named["FORMAT"] else "dense"
    return record


def resources(compiled) -> dict:
    """KiB of shared memory, registers and spilled bytes per thread; on Hopper also the products that decode into
    registers, and what overwrites them too early."""
    text = tool("cuobjdump", "-res-usage", cubin=compiled.asm["cubin"])
    registers, stack = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK"))
    record = {"shared_kib": compiled.metadata.shared / 1024, "registers": registers, "stack_bytes": stack}
    if compiled.metadata.target.arch == 90:
        record["register_products"], record["hazards"] = register_hazards(compiled.asm["cubin"])
    return record


def compile_layer(name: str, arch: int, options: argparse.Namespace) -> list[dict]:
    """The kernels of forward and backward of the kernel package called ``name``, for one card."""
    driver.set_active(AbsentCard(arch))
    modules = {
        file: importlib.import_module(f"{name}.kernels.{file}")
        for file in ("routing", "combine", "gate_up", "linear", "down_backward", "four_bit_fast", "dequantize", "gemv",
                     "weight_grad", "product", "experts")
    }  # fmt: skip
    regime, tiling, projection = (importlib.import_module(f"{name}.{f}") for f in ("regime", "tiling", "projection"))
    compiler = Compiler(importlib.import_module(f"{name}.kernels.launch").specialize)
    for module in modules.values():
        if hasattr(module, "launch"):
            module.launch = compiler
    for module in (regime, modules["dequantize"]):
        module.has_byte_permute = lambda device: True
    modules["product"]._has_tma = lambda device: arch >= 90
    tiling._card = lambda device: (f"sm_{arch}", CARDS[arch] * 1024)
    gate_up = projection.Projection(packed(projection, options.experts, 2 * options.intermediate, options.hidden))
    down = projection.Projection(packed(projection, options.experts, options.hidden, options.intermediate))
    wanted = projection.Gradients(True, True, *[False] * 6)
    for rows in options.rows:
        tokens = max(1, int(rows * options.experts / options.top_k))
        x = torch.empty(tokens, options.hidden, dtype=torch.bfloat16)
        routed = torch.empty(tokens, options.top_k, dtype=torch.int64), x.new_empty(tokens, options.top_k)
        modules["experts"].experts_forward(x, *routed, gate_up, down, None, "silu", False)
        _, *saved = modules["experts"].experts_forward(x, *routed, gate_up, down, None, "silu", True)
        modules["experts"].experts_backward(x, x, *routed, gate_up, down, None, tuple(saved), "silu", wanted)
    return list(compiler.records.values())


def packed(projection, experts: int, n: int, k: int):
    """A double-quantized nf4 stack of whatever memory holds: nothing reads it."""
    size = experts * n * k
    absmax, code = torch.empty(size // 64, dtype=torch.uint8), torch.empty(16)
    nested = torch.empty(size // 64 // 256), torch.empty(256), torch.empty(())
    data = torch.empty(size // 2, dtype=torch.uint8)
    return projection.FourBitWeight(data, absmax, code, *nested, (experts, n, k), 64, 256, "nf4", torch.bfloat16)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", type=Path, default=Path("."), help="folder that holds build/")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--rows", type=float, nargs="+", default=ROWS, help="rows per expert; below 1, some have none")
    parser.add_argument("--arch", type=int, nargs="+", default=list(CARDS), choices=list(CARDS))
    for name, default in (("hidden", 2048), ("intermediate", 768), ("experts", 128), ("top-k", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args(argv)


def main() -> int:
    options = parse()
    kernel = load_kernel(options.kernel.resolve())
    cards = {f"sm_{arch}": compile_layer(kernel.__name__, arch, options) for arch in options.arch}
    shape = {field: getattr(options, field) for field in ("hidden", "intermediate", "experts", "top_k")}
    report = {
        "command": shlex.join(["python", "benchmarks/compile_report.py", *sys.argv[1:]]),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "kernel": kernel_identity(kernel),
        "shape": shape,
        "cards": cards,
    }
    write_whole(options.out / "compile_report.json", json.dumps(report, indent=1) + "\n")
    for arch, records in zip(options.arch, cards.values()):
        most = max(records, key=lambda record: record["shared_kib"])
        hazards = [record for record in records if record.get("hazards")]
        print(f"sm_{arch}: {len(records)} kernels, at most {most['shared_kib']:.1f} of {CARDS[arch]} KiB, {hazards=}")
        if most["shared_kib"] > CARDS[arch] or hazards:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
