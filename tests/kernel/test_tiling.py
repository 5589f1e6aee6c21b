"""Tile choice: pure Python, so every card's table can be checked on any machine."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tune import changeover

KIB = 1024
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiling(kernel) -> ModuleType:
    return importlib.import_module(f"{kernel.__name__}.tiling")


def _shipped(tiling: ModuleType) -> list[Path]:
    return sorted(tiling.card_file("any").parent.glob("*.json"))


def _choices(tiling: ModuleType, card: str, shared_memory: int) -> list[tuple[object, int]]:
    """Every tiling a card may get, with the bytes of an element."""
    dtypes = (torch.bfloat16, torch.float32)
    return [(tiling._choose(2**i, t, card, shared_memory), t.itemsize) for t in dtypes for i in range(14)]


def _assert_fits(choice, itemsize: int, shared_memory: int) -> None:
    """One step of a pipeline holds a piece of each factor; gate_up holds gate and up columns."""
    for tile, columns in ((choice.gate_up, 2), (choice.linear, 1), (choice.down_backward, 1)):
        step = (choice.block_m + columns * tile.block_n) * tile.block_k
        assert step * itemsize * tile.num_stages <= shared_memory
    tile = choice.weight_grad
    step = choice.weight_grad_block_m * (tile.block_n + tile.block_k)
    assert step * itemsize * tile.num_stages <= shared_memory


@pytest.mark.parametrize("shared_memory", [64 * KIB, 99 * KIB, 163 * KIB, 227 * KIB])
def test_every_choice_fits_the_shared_memory_of_a_card_without_a_table(tiling, shared_memory):
    for choice, itemsize in _choices(tiling, "a card nobody has tuned for", shared_memory):
        _assert_fits(choice, itemsize, shared_memory)


def test_a_tuned_table_fits_its_card_and_says_where_it_comes_from(tiling):
    assert _shipped(tiling), "no tuned table is shipped"
    for path in _shipped(tiling):
        content = json.loads(path.read_text())
        assert tiling.card_file(content["card"]) == path
        assert {"torch", "triton", "shape", "tilings"} <= set(content)
        for choice, itemsize in _choices(tiling, content["card"], 227 * KIB):
            _assert_fits(choice, itemsize, 227 * KIB)


def test_the_rows_to_decode_in_registers_are_those_that_were_timed(tiling):
    faster, slower = {"fast": 1.0, "dequantize": 1.1}, {"fast": 1.1, "dequantize": 1.0}
    both = {"forward": faster, "backward": faster}
    one = {"forward": slower, "backward": faster}
    hardly = {"forward": {"fast": 1.0, "dequantize": 1.05}, "backward": faster}
    assert changeover({64: both, 256: one, 512: both}) == {"forward": 64, "backward": 512}
    assert changeover({64: one, 256: both}) == {"forward": 0, "backward": 256}
    assert changeover({64: both, 256: hardly}) == {"forward": 64, "backward": 256}
    tables = [content for path in _shipped(tiling) if "fast_rows" in (content := json.loads(path.read_text()))]
    assert tables, "no tuned table says"
    for content in tables:
        times = content["milliseconds"]["fast_rows"]
        assert content["fast_rows"] == changeover({int(rows): each for rows, each in times.items()})


def test_a_tuned_table_is_taken_for_its_card_alone(tiling):
    card = json.loads(_shipped(tiling)[0].read_text())["card"]
    tuned, other = ([tiling._choose(2**i, torch.bfloat16, c, 227 * KIB) for i in range(14)] for c in (card, "another"))
    assert tuned != other


def test_a_tuned_table_may_say_up_to_how_many_rows_weights_are_decoded_in_registers(tiling, tmp_path, monkeypatch):
    (tmp_path / "cpu.json").write_text(json.dumps({"fast_rows": {"forward": 77, "backward": 99}}))
    assert tiling.tuned_fast_rows(CPU) is None
    tiling._tuned.cache_clear()
    monkeypatch.setattr(tiling, "card_file", lambda card: tmp_path / f"{card}.json")
    assert tiling.tuned_fast_rows(CPU) == {"forward": 77, "backward": 99}
    tiling._tuned.cache_clear()


def test_all_blocks_are_powers_of_two_that_a_dot_can_take(tiling):
    for choice, _ in _choices(tiling, "a card nobody has tuned for", 227 * KIB):
        tiles = (choice.gate_up, choice.linear, choice.down_backward, choice.weight_grad)
        sizes = [choice.block_m, choice.weight_grad_block_m, *(n for t in tiles for n in (t.block_n, t.block_k))]
        assert all(size >= 16 and size & (size - 1) == 0 for size in sizes)


def test_tiles_get_no_lower_as_rows_an_expert_grow(tiling):
    heights = [tiling.choose(rows, 8, torch.bfloat16, CPU).block_m for rows in (0, 1, 8, 64, 256, 1024, 10**6)]
    assert heights == sorted(heights) and heights[0] == 16


def test_rows_an_expert_decide_not_rows_alone(tiling):
    assert tiling.choose(128, 128, torch.bfloat16, CPU) == tiling.choose(1, 1, torch.bfloat16, CPU)
    assert tiling.choose(4096, 1, torch.bfloat16, CPU) != tiling.choose(4096, 4096, torch.bfloat16, CPU)


@pytest.mark.parametrize(("n", "k", "block_n", "block_k"), [(1, 1, 16, 16), (17, 40, 32, 64), (2048, 768, 128, 64)])
def test_a_tile_is_no_wider_than_a_thin_matrix_needs(tiling, n, k, block_n, block_k):
    tile = tiling.Tile(128, 64, 4, 3).fit(n, k)
    assert (tile.block_n, tile.block_k) == (block_n, block_k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("columns", [1, 16, 40, 512])
def test_an_adapters_tiles_fit_a_consumer_cards_shared_memory(tiling, columns, dropout, dtype):
    for rows in (1, 100, 10**6):
        narrow = tiling.choose_narrow(rows, 8, columns, dropout, dtype, CPU)
        tile = narrow.low_rank
        stage = tile.block_k * (narrow.rows * dtype.itemsize + tile.block_n * 4)  # the factors may be fp32
        assert tile.block_n >= 16 and tile.num_stages >= 1 and stage * tile.num_stages <= 99 * KIB
        tile = narrow.factor_grads
        assert narrow.grad_rows * (tile.block_n + tile.block_k) * dtype.itemsize * tile.num_stages <= 99 * KIB


def test_a_left_operand_that_stays_in_registers_has_fewer_than_64_rows(tiling):
    for rows in (1, 10**6):
        narrow = tiling.choose_narrow(rows, 8, 512, True, torch.bfloat16, CPU)
        assert narrow.rows < 64 and narrow.factor_grads.block_n < 64
