"""tune.py on a card that is not there: kernels that only note which tile they were given, and times made up for it."""

import importlib
import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
import torch
import triton

import tune

SHARED_MEMORY = 99 * 1024
ROWS = ("8", "64", "1024")  # of which 64 and 1024 have two heights to choose from
KERNELS = {"gate_up": "gate_up", "linear": "linear_tiles", "down_backward": "down_backward"}
FASTEST = {  # by rows per expert: rows per tile, and the tiles that are to win
    "8": (16, (32, 128, 4, 4), (64, 128, 4, 4), (128, 64, 4, 4)),
    "64": (128, (64, 64, 8, 3), (128, 32, 8, 4), (64, 32, 8, 4)),
    "1024": (128, (128, 64, 8, 2), (256, 64, 8, 2), (128, 64, 8, 3)),
}
FASTEST_GRAD = (32, (128, 128, 4, 5))
FAST_ROWS = {"forward": 640, "backward": 1024}
"""Up to here the stub has weights decoded in registers faster."""


class Card:
    """Has ``launched`` what the last call launched, ``tried`` all that was ever timed, and a time for it."""

    def __init__(self):
        self.launched, self.tried, self.rows, self.broken, self.went_back = [], set(), None, False, False

    def launch(self, name: str, block_m: int, tile) -> None:
        numbers = (tile.block_n, tile.block_k, tile.num_warps, tile.num_stages)
        self.launched.append((name, block_m, numbers))
        if (name, numbers) == ("gate_up", (64, 64, 4, 5)):
            raise triton.runtime.errors.OutOfResources(300_000, SHARED_MEMORY, "shared memory")

    def time(self, call, warmup: int, rep: int, return_mode: str) -> float:
        self.launched.clear()
        self.went_back = False
        call()
        assert len(set(self.launched)) == 1, "all of what is timed has one tile"
        return self.milliseconds(*self.launched[0])

    def milliseconds(self, name: str, block_m: int, tile) -> float:
        self.tried.add((name, block_m, tile))
        if name == "layer":
            if self.broken:
                raise KeyboardInterrupt
            direction = "backward" if self.went_back else "forward"
            return 1.0 if (tile == "fast") == (block_m <= FAST_ROWS[direction]) else 2.0
        if name == "weight_grad":
            return 1.0 if (block_m, tile) == FASTEST_GRAD else 2.0
        height, *tiles = FASTEST[self.rows]
        if block_m != height:  # the fastest of one kernel, but not of all three
            return 0.5 if name == "gate_up" else 9.0
        return 1.0 if tile == tiles[list(KERNELS).index(name)] else 2.0


@pytest.fixture
def card(kernel, monkeypatch) -> Card:
    """The kernels' own signatures check how they are called; the fewest 4-bit experts run, as they do on a CPU."""
    card = Card()

    def noting(name: str, real):
        def note(*arguments, **options):
            given = inspect.signature(real).bind(*arguments, **options).arguments
            card.launch(name, given["block_m"], given["tile"])

        return create_autospec(real, side_effect=note)

    def layer(x, *arguments, **options):
        assert len(x) % 4 == 0, "two experts a token, of eight"
        card.launched.append(("layer", len(x) // 4, regime.regime()))
        return fused_experts(x, *arguments, **options) if len(x) // 4 == min(tune.DECODED_ROWS) else x * 1

    def back(*arguments, **options):
        card.went_back = True
        card.launched.append(("layer", len(arguments[1]) // 4, regime.regime()))
        return grad(*arguments, **options)

    grad = torch.autograd.grad
    for module, function in (*KERNELS.items(), ("weight_grad", "weight_grad_rows")):
        home = importlib.import_module(f"{kernel.__name__}.kernels.{module}")
        monkeypatch.setattr(home, function, noting(module, getattr(home, function)))
    routing = importlib.import_module(f"{kernel.__name__}.kernels.routing")
    sorted_slots = (torch.empty(0), torch.empty(0), torch.empty(9), torch.empty(0))
    monkeypatch.setattr(routing, "routing", create_autospec(routing.routing, return_value=sorted_slots))
    regime = importlib.import_module(f"{kernel.__name__}.regime")
    fused_experts = kernel.fused_experts
    monkeypatch.setattr(regime, "regime", lambda *_: "its own choice")  # tune.py changes it, and changes it back
    monkeypatch.setattr(kernel, "fused_experts", layer)
    monkeypatch.setattr(torch.autograd, "grad", back)

    one_size = tune.tune

    def noting_rows(kernel, sizes, rows):
        card.rows = str(rows)
        return one_size(kernel, sizes, rows)

    monkeypatch.setattr(tune, "tune", noting_rows)
    monkeypatch.setattr(tune, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(tune, "get_local_kernel", lambda folder: kernel)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card")
    properties = SimpleNamespace(shared_memory_per_block_optin=SHARED_MEMORY)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(triton.testing, "do_bench", card.time)
    return card


def run(out: Path) -> dict:
    sizes = ["--hidden", "128", "--intermediate", "128", "--experts", "8", "--top-k", "2"]
    tune.main([*sizes, "--rows", *ROWS, "--out", str(out)])
    return json.loads(out.read_text())


def test_the_fastest_go_into_the_table_and_the_kernel_takes_them(card, kernel, tmp_path, monkeypatch):
    out = tmp_path / "configs/A_card.json"
    table = run(out)
    assert {path.name for path in out.parent.iterdir()} == {"A_card.json"}
    step, grad = FASTEST_GRAD
    for rows in ROWS:
        block_m, *tiles = FASTEST[rows]
        assert table["tilings"][rows] == {
            "block_m": block_m, **dict(zip(KERNELS, map(list, tiles))),
            "weight_grad_block_m": step, "weight_grad": list(grad),
        }  # fmt: skip
        assert table["milliseconds"][rows] == dict.fromkeys([*KERNELS, "weight_grad"], 1.0)
    assert table["fast_rows"] == FAST_ROWS and table["card"] == "A card"

    tiling = importlib.import_module(f"{kernel.__name__}.tiling")
    monkeypatch.setattr(tiling, "card_file", lambda card: out)
    tiling._tuned.cache_clear()
    taken = tiling._choose.__wrapped__(64, torch.bfloat16, "A card", SHARED_MEMORY)
    tiling._tuned.cache_clear()
    assert taken.block_m == 128 and taken.gate_up == tiling.Tile(*FASTEST["64"][1])


def test_no_tile_is_tried_that_the_cards_shared_memory_cannot_hold(card, tmp_path):
    run(tmp_path / "A_card.json")
    names = {name for name, *_ in card.tried}
    assert names == {*KERNELS, "weight_grad", "layer"}
    for name, block_m, tile in (entry for entry in card.tried if entry[0] != "layer"):
        block_n, block_k, _, stages = tile
        depth, columns = (block_m, block_n + block_k) if name == "weight_grad" else (block_k, block_m + block_n)
        if name == "gate_up":
            columns += block_n  # gate and up
        assert 2 * depth * columns * stages <= SHARED_MEMORY, (name, block_m, tile)
    listed = {tile for tiles in tune.LINEAR.values() for tile in tiles}
    assert {tile for name, _, tile in card.tried if name == "linear"} - listed, "some had to be cut"


def test_the_table_is_written_whole_or_not_at_all(card, tmp_path, monkeypatch):
    out = tmp_path / "A_card.json"
    out.write_text("as it was")
    write = Path.write_text

    def half(path, text):
        write(path, text[: len(text) // 2])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="no space left"):
        run(out)
    assert out.read_text() == "as it was"


def test_an_interrupted_run_writes_nothing(card, tmp_path):
    card.broken = True
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "A_card.json")
    assert not list(tmp_path.iterdir())


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device found"):
        tune.main([])
