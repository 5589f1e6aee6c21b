"""What a routing table must say, in plain Python."""

from collections.abc import Iterable

import torch


def assert_table_holds(table: Iterable[torch.Tensor], index: torch.Tensor, experts: int, block_m: int) -> None:
    """``table`` is the one that sorts ``index`` (T, k) by expert; ids outside [0, E) are slots to skip."""
    table = tuple(table)
    assert all(tensor.dtype == torch.int32 and tensor.device == index.device for tensor in table)
    order, m_sizes, offsets, tiles = (tensor.tolist() for tensor in table)
    ids = [expert if 0 <= expert < experts else experts for expert in index.reshape(-1).tolist()]
    assert order == sorted(range(len(ids)), key=ids.__getitem__), "slots are not sorted by expert, or not stably"
    assert m_sizes == [ids.count(expert) for expert in range(experts)]
    assert offsets == [sum(m_sizes[:expert]) for expert in range(experts + 1)]
    assert len(tiles) == len(ids) // block_m + experts + 1
    assert_tiles_cover(tiles, [*zip(range(experts), offsets, offsets[1:])], block_m)


def assert_tiles_cover(tiles: list[list[int]], runs: list[tuple[int, int, int]], block_m: int) -> None:
    """Of each run (label, first row, end) every row is in one tile of that label, and there are no other tiles.

    A tile covers ``block_m`` rows, cut off where its run ends.
    """
    wanted = [[label, row, end] for label, first, end in runs for row in range(first, end, block_m)]
    assert [tile for tile in tiles if tile[0] >= 0] == wanted
    assert all(tile == [-1, -1, -1] for tile in tiles if tile[0] < 0)
