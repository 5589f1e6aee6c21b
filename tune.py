"""Tunes the tiles for this machine's GPU: python tune.py [--hidden 2048 --intermediate 768 --experts 128 --top-k 8]

Times a short, reasoned list of tiles for every kernel of the layer and every number of rows per expert, then up to how
many rows 4-bit weights are better decoded in registers than beforehand. Writes the fastest to
torch-ext/qwen3_moe_fused/configs/<card>.json, which the next build ships. A few minutes, most of them compiling; tiles
that the card's shared memory cannot hold are cut down or left out before they are tried.
"""

import argparse
import importlib
import json
import statistics
import sys
from dataclasses import asdict, astuple, replace
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from kernels import get_local_kernel

ROOT = Path(__file__).resolve().parent
DEVICE = torch.device("cuda", 0)
ROWS = (1, 8, 32, 64, 128, 256, 1024)  # rows per expert; each entry serves up to the next
BLOCK_M = {1: (16,), 8: (16,), 32: (32, 64), 64: (64, 128), 128: (64, 128), 256: (128,), 1024: (128, 256)}

# (block_n, block_k, warps, stages) by block_m. Low tiles wait for weights: deep steps, many in flight. High ones
# compute: as many columns as registers hold.
GATE_UP = {
    16: [(64, 128, 4, 3), (64, 128, 4, 4), (32, 128, 4, 4), (64, 64, 4, 5), (128, 64, 4, 4)],
    32: [(64, 128, 4, 3), (64, 64, 4, 4), (128, 64, 4, 4), (128, 64, 8, 4)],
    64: [(64, 64, 4, 4), (64, 64, 4, 3), (128, 64, 4, 4), (128, 64, 8, 4), (64, 32, 4, 4)],
    128: [(128, 64, 8, 3), (128, 64, 8, 4), (64, 64, 4, 4), (64, 64, 8, 4), (64, 32, 8, 4)],
    256: [(64, 64, 8, 3), (64, 64, 8, 4)],
}
LINEAR = {
    16: [(128, 128, 4, 3), (128, 128, 4, 4), (64, 128, 4, 4), (64, 256, 4, 3), (128, 64, 4, 5)],
    32: [(128, 128, 4, 3), (128, 64, 4, 4), (256, 64, 8, 4), (64, 128, 4, 4)],
    64: [(128, 64, 4, 4), (128, 64, 4, 3), (256, 64, 8, 4), (128, 128, 4, 3), (128, 32, 4, 4)],
    128: [(256, 64, 8, 3), (256, 64, 8, 4), (128, 64, 8, 4), (128, 64, 4, 4), (128, 32, 8, 4)],
    256: [(128, 64, 8, 3), (128, 64, 8, 4)],
}
DOWN_BACKWARD = {
    16: [(64, 128, 4, 3), (64, 128, 4, 4), (128, 128, 4, 3), (128, 64, 4, 4)],
    32: [(64, 128, 4, 3), (64, 64, 4, 4), (128, 64, 4, 4)],
    64: [(64, 64, 4, 4), (128, 64, 4, 4), (128, 64, 8, 4), (64, 32, 4, 4)],
    128: [(128, 64, 8, 3), (128, 64, 8, 4), (64, 64, 4, 4), (64, 64, 8, 4), (64, 32, 8, 4)],
    256: [(64, 64, 8, 3), (64, 64, 8, 4)],
}
MARGIN = 1.08  # what is gained with the routing timed here, where uneven routing would lose as much
DECODED_ROWS = (64, 256, 512, 640, 768, 896, 1024, 1280, 1536, 2048)  # rows per expert at which two ways are compared
WEIGHT_GRAD = {  # by rows summed a step
    16: [(128, 128, 4, 5), (128, 128, 4, 6), (128, 256, 8, 5)],
    32: [(128, 128, 4, 5), (128, 128, 4, 6), (128, 256, 8, 5)],
    64: [(128, 256, 8, 5), (128, 128, 8, 5), (64, 128, 4, 4)],
}


class Layer:
    """One layer's tensors, and a timed launch of each kernel on them."""

    def __init__(self, kernel, sizes, rows: int):
        self.modules = SimpleNamespace(
            **{name: importlib.import_module(f"{kernel.__name__}.kernels.{name}") for name in
               ("routing", "gate_up", "linear", "down_backward", "weight_grad")}
        )  # fmt: skip
        experts, hidden, width, k = sizes.experts, sizes.hidden, sizes.intermediate, sizes.top_k
        tokens = max(1, rows * experts // k)
        options = {"device": DEVICE, "dtype": torch.bfloat16}
        scores = torch.randn(tokens, experts, device=DEVICE) + 0.5 * torch.randn(experts, device=DEVICE)
        weights, self.index = scores.softmax(-1).topk(k)
        self.weights = weights.bfloat16()
        self.experts, self.k, slots = experts, k, tokens * k
        self.hidden_states = torch.randn(tokens, hidden, **options)
        self.gate_up_proj = torch.randn(experts, 2 * width, hidden, **options) / hidden**0.5
        self.down_proj = torch.randn(experts, hidden, width, **options) / width**0.5
        self.pre_activation = torch.randn(slots, 2 * width, **options)
        self.intermediate = torch.randn(slots, width, **options)
        self.slots = torch.empty(slots, hidden, **options)
        self.grad_pre_activation = torch.empty_like(self.pre_activation)
        self.parts = torch.empty(width, slots, device=DEVICE)

    def route(self, block_m: int) -> None:
        self.block_m = block_m
        self.order, _, self.offsets, self.tiles = self.modules.routing.routing(self.index, self.experts, block_m)

    def gate_up(self, tile) -> None:
        self.modules.gate_up.gate_up(
            self.hidden_states, self.gate_up_proj, self.order, self.tiles, self.k, "silu", self.block_m, tile,
            self.pre_activation, self.intermediate,
        )  # fmt: skip

    def linear(self, tile) -> None:
        """The down projection and the gradient of hidden_states, which share a tile."""
        launch = self.modules.linear.linear_tiles
        launch(self.intermediate, self.down_proj, self.offsets, self.tiles, self.block_m, tile, self.slots, self.order)
        launch(
            self.pre_activation, self.gate_up_proj, self.offsets, self.tiles, self.block_m, tile, self.slots,
            self.order, transposed=True,
        )  # fmt: skip

    def down_backward(self, tile) -> None:
        self.modules.down_backward.down_backward(
            self.hidden_states, self.down_proj, self.pre_activation, self.weights, self.order, self.tiles, "silu",
            self.block_m, tile, self.grad_pre_activation, self.parts[: -(-self.intermediate.shape[1] // tile.block_n)],
            None,
        )  # fmt: skip

    def weight_grad(self, rows: int, tile) -> None:
        launch = self.modules.weight_grad.weight_grad_rows
        launch(self.pre_activation, self.hidden_states, self.offsets, rows, tile, self.order, self.k, x_by_token=True)
        launch(self.hidden_states, self.intermediate, self.offsets, rows, tile, self.order, self.k, grad_by_token=True)


def fastest(name, launch, candidates):
    """(milliseconds, tile) of the fastest candidate; one that does not compile or fit is reported and passed over."""
    results = []
    for tile in dict.fromkeys(candidates):
        try:
            results.append(
                (triton.testing.do_bench(lambda t=tile: launch(t), warmup=3, rep=12, return_mode="median"), tile)
            )
        except triton.runtime.errors.OutOfResources as error:
            print(f"    {name} {astuple(tile)}: {error}")
    for time, tile in sorted(results, key=lambda pair: pair[0]):
        print(f"    {name:14s} {astuple(tile)!s:20s} {time:.4f} ms", flush=True)
    return min(results, key=lambda pair: pair[0])


def tune(kernel, sizes, rows: int):
    """The fastest tiling for one number of rows per expert, and its kernels' times in milliseconds."""
    tiling = importlib.import_module(f"{kernel.__name__}.tiling")
    shared = torch.cuda.get_device_properties(DEVICE).shared_memory_per_block_optin
    layer = Layer(kernel, sizes, rows)
    base = tiling.choose(rows * sizes.experts, sizes.experts, torch.bfloat16, DEVICE)

    def fitting(field, candidates, **others):
        made = (replace(base, **{field: tiling.Tile(*numbers)}, **others) for numbers in candidates)
        return [getattr(tiling.limit(one, 2, shared), field) for one in made]

    best = None
    for block_m in BLOCK_M[rows]:
        print(f"  {rows} rows per expert, block_m {block_m}")
        layer.route(block_m)
        lists = {"gate_up": GATE_UP, "linear": LINEAR, "down_backward": DOWN_BACKWARD}
        chosen = {
            name: fastest(name, getattr(layer, name), fitting(name, lists[name][block_m], block_m=block_m))
            for name in lists
        }
        total = sum(time for time, _ in chosen.values())
        if best is None or total < best[0]:
            best = total, block_m, chosen
    _, block_m, chosen = best
    grads = []
    for step, candidates in WEIGHT_GRAD.items():
        tiles = fitting("weight_grad", candidates, weight_grad_block_m=step)
        grads.append((*fastest(f"weight_grad {step}", lambda t, s=step: layer.weight_grad(s, t), tiles), step))
    chosen["weight_grad"] = min(grads, key=lambda entry: entry[0])[:2]
    step = min(grads, key=lambda entry: entry[0])[2]
    tiles = {name: tile for name, (_, tile) in chosen.items()}
    times = {name: round(time, 4) for name, (time, _) in chosen.items()}
    return tiling.Tiling(block_m=block_m, weight_grad_block_m=step, **tiles), times


def tune_fast_rows(kernel, sizes):
    """The ``changeover`` from decoding in registers to decoding beforehand, of forward and of backward, and both ways'
    times in milliseconds."""
    regime, form = (importlib.import_module(f"{kernel.__name__}.{name}") for name in ("regime", "form"))
    experts, hidden, width = sizes.experts, sizes.hidden, sizes.intermediate
    stacks = random_nf4(kernel, (experts, 2 * width, hidden)), random_nf4(kernel, (experts, hidden, width))
    choose, times = regime.regime, {}

    def take(way):
        regime.regime = lambda *_: way
        form.forget()

    for count in DECODED_ROWS:
        tokens = count * experts // sizes.top_k
        scores = torch.randn(tokens, experts, device=DEVICE) + 0.5 * torch.randn(experts, device=DEVICE)
        weights, index = scores.softmax(-1).topk(sizes.top_k)
        x = torch.randn(tokens, hidden, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        grad, out = torch.randn_like(x), kernel.fused_experts(x, index, weights, *stacks)
        directions = {
            "forward": lambda: kernel.fused_experts(x, index, weights, *stacks),  # noqa: B023
            "backward": lambda: torch.autograd.grad(out, x, grad, retain_graph=True),  # noqa: B023
        }
        times[count] = {name: in_turns(run, take) for name, run in directions.items()}
        print(f"  {count} rows per expert: {times[count]}", flush=True)
    regime.regime = choose
    form.forget()
    return changeover(times), times


def in_turns(run, take):
    """Milliseconds of ``run`` after ``take(way)``, by way: in turns, as a GPU is slower when it has become warm."""
    samples = {"fast": [], "dequantize": []}
    for ways in (list(samples), list(samples)[::-1]) * 2:
        for way in ways:
            take(way)
            samples[way].append(triton.testing.do_bench(run, warmup=25, rep=60, return_mode="median"))
    return {way: round(statistics.median(each), 4) for way, each in samples.items()}


def changeover(times):
    """The rows per expert up to which decoding beforehand takes at least ``MARGIN`` times as long, by direction; 0 if
    it does not from the first on."""

    def last(direction):
        def is_faster(rows):
            return times[rows][direction]["fast"] * MARGIN <= times[rows][direction]["dequantize"]

        return max(takewhile(is_faster, sorted(times)), default=0)

    return {direction: last(direction) for direction in ("forward", "backward")}


def random_nf4(kernel, shape):
    """A stack of random bytes: what the weights are does not matter to their time."""
    size = shape[0] * shape[1] * shape[2]
    packed = torch.randint(256, (size // 2,), dtype=torch.uint8, device=DEVICE)
    absmax, code = torch.rand(size // 64, device=DEVICE), torch.linspace(-1, 1, 16, device=DEVICE)
    return kernel.FourBitWeight(packed, absmax, code, None, None, None, shape, 64, 0, "nf4", torch.bfloat16)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS, choices=ROWS, help="rows per expert to tune for")
    parser.add_argument("--kernel", type=Path, default=ROOT, help="folder of a build (default: this repository)")
    parser.add_argument("--out", type=Path, help="where to write (default: the package's configs folder)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    sizes = parse(argv)
    if not torch.cuda.is_available():
        sys.exit("tune.py: no CUDA device found")
    kernel = get_local_kernel(sizes.kernel)
    card = torch.cuda.get_device_name(DEVICE)
    tilings, times = {}, {}
    for rows in sizes.rows:
        tiling, times[rows] = tune(kernel, sizes, rows)
        tilings[rows] = {
            name: list(value.values()) if isinstance(value, dict) else value for name, value in asdict(tiling).items()
        }
        print(f"{rows} rows per expert: {tilings[rows]} {times[rows]}", flush=True)
    fast_rows, times["fast_rows"] = tune_fast_rows(kernel, sizes)
    print(f"decoded in registers up to so many rows per expert: {fast_rows}", flush=True)
    shape = {name: getattr(sizes, name) for name in ("hidden", "intermediate", "experts", "top_k")}
    result = {
        "card": card, "torch": torch.__version__, "triton": triton.__version__, "shape": shape,
        "milliseconds": times, "fast_rows": fast_rows, "tilings": tilings,
    }  # fmt: skip
    out = sizes.out or ROOT / "torch-ext/qwen3_moe_fused/configs" / f"{card.replace(' ', '_')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_suffix(".part")
    beside.write_text(json.dumps(result, indent=1) + "\n")
    beside.rename(out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
