"""The sweep over the ways to multiply 4-bit experts: what it calls slower, and that it forces what it says."""

import importlib
import json
import time
from functools import partial
from itertools import groupby

import crossover
import pytest
import torch
from harness import measure


def record(way, **medians):
    times = {way: median and {"median": median} for way, median in medians.items()}
    return {"tokens": 16, "rows": 1.0, "pass": "forward", "chosen": way, "ms": times}


@pytest.mark.parametrize(("chosen", "found"), [(1.0, 0), (1.02, 0), (1.04, 1)])
def test_three_percent_over_the_fastest_is_slower(chosen, found):
    slower = crossover.slower([record("plain", fast=1.0, plain=2.0, dequantize=None, chosen=chosen)])
    assert len(slower) == found
    assert all(place["fastest"] == "fast" and place["ratio"] == pytest.approx(chosen) for place in slower)


def test_two_timings_of_one_way_are_not_two_ways():
    """On an H200 at 4096 tokens fast took 0.9857 ms, and chosen, which was fast, 1.0159."""
    times = {"fast": 0.9857, "plain": 9.0917, "dequantize": 1.1986, "gemv": None}
    assert crossover.slower([record("fast", chosen=1.0159, **times)]) == []
    assert crossover.slower([record("fast", chosen=0.9857, **times | {"fast": 1.0159})]) == []
    (place,) = crossover.slower([record("dequantize", chosen=1.0159, **times)])
    assert place["fastest"] == "fast"
    (place,) = crossover.slower([record("fast", chosen=1.0159, **times | {"dequantize": 0.95})])
    assert place["fastest"] == "dequantize" and place["ratio"] == pytest.approx(0.9857 / 0.95)


def test_a_way_of_its_own_in_each_direction_is_timed_left_alone():
    times = {"fast": 4.716, "plain": None, "dequantize": 4.959, "gemv": None}
    assert crossover.slower([record("dequantize + fast", chosen=4.6, **times)]) == []
    (place,) = crossover.slower([record("dequantize + fast", chosen=4.9, **times)])
    assert place["fastest"] == "fast" and place["ratio"] == pytest.approx(4.9 / 4.716)


def test_each_way_is_forced_and_the_choice_given_back(kernel):
    regime = importlib.import_module(f"{kernel.__name__}.regime")
    before, seen = (regime.regime, regime.GEMV_SLOTS), []
    for way in (*crossover.WAYS, crossover.CHOSEN):
        run = crossover.prepared(kernel, way, lambda: seen.append((regime.regime, regime.GEMV_SLOTS)), None, "cpu")
        run()
        assert (regime.regime, regime.GEMV_SLOTS) == before and len(seen) % 2 == 0
        choose, gemv_slots = seen[-1]
        assert (choose is before[0]) == (way == crossover.CHOSEN)
        assert gemv_slots == (before[1] if way in ("gemv", crossover.CHOSEN) else 0)
        assert way in ("gemv", crossover.CHOSEN) or choose() == way


def test_gemv_has_no_time_where_the_layer_would_choose_another_way(kernel):
    regime = importlib.import_module(f"{kernel.__name__}.regime")
    assert crossover.prepared(kernel, "gemv", lambda: regime.regime(1, (), torch.bfloat16, "cpu"), None, "cpu") is None
    assert crossover.prepared(kernel, "gemv", lambda: None, None, "cpu")


def test_the_chosen_way_is_what_the_layer_was_told(kernel, monkeypatch):
    regime = importlib.import_module(f"{kernel.__name__}.regime")
    monkeypatch.setattr(regime, "regime", lambda rows: "plain" if rows < 40 else "dequantize")
    before = regime.regime
    assert crossover.choice(kernel, lambda: regime.regime(39)) == "plain"
    assert crossover.choice(kernel, lambda: (regime.regime(40), regime.regime(40))) == "dequantize"
    both_again = (40, 39, 40, 39)  # forward and backward, rehearsed first
    assert crossover.choice(kernel, lambda: [regime.regime(rows) for rows in both_again]) == "dequantize + plain"
    assert crossover.choice(kernel, lambda: None) == "gemv"
    assert regime.regime is before


def test_a_way_that_cannot_has_no_time_and_gives_the_choice_back(kernel, monkeypatch):
    monkeypatch.setattr(crossover, "FAR", float("inf"))
    regime = importlib.import_module(f"{kernel.__name__}.regime")
    before = regime.regime

    def call():
        if regime.regime is not before and regime.regime() == "plain":
            raise ValueError("no tile fits")

    times = crossover.time_ways(kernel, call, crossover.parse(["--device", "cpu", "--budget-ms", "1"]))
    assert times.pop("plain") is None and times.pop("gemv") is None and regime.regime is before
    assert all(len(time["rounds"]) == 5 for time in times.values())


def test_a_way_that_is_far_slower_is_timed_once(kernel):
    regime = importlib.import_module(f"{kernel.__name__}.regime")
    before = regime.regime

    def call():
        time.sleep(0.05 if regime.regime is not before and regime.regime() == "plain" else 0.005)

    times = crossover.time_ways(kernel, call, crossover.parse(["--device", "cpu", "--budget-ms", "1"]))
    assert {way: len(each["rounds"]) for way, each in times.items() if each} == {
        "fast": 5, "plain": 1, "dequantize": 5, "chosen": 5,
    }  # fmt: skip
    assert times["plain"]["median"] > 40


def test_ways_are_timed_in_turns_each_round_begun_by_another():
    seen = []
    measure.time_in_turns({name: partial(seen.append, name) for name in "abc"}, rounds=3, budget_ms=1, device="cpu")
    first_look, *turns = "abc", "abc", "bac", "cab"  # the second goes backwards
    calls = first_look + "".join(turns)
    assert [name for name, _ in groupby(seen)] == [name for name, _ in groupby(calls)]


@pytest.mark.parametrize(("imbalance", "least", "most"), [(0.0, 0.125, 0.18), (0.5, 0.25, 0.6), (4.0, 0.9, 1.0)])
def test_imbalance_gives_few_experts_nearly_all_rows(imbalance, least, most, monkeypatch, kernel_dir, tmp_path):
    drawn = []

    def recorded(*arguments):
        drawn.append(make_inputs(*arguments))
        return drawn[-1]

    make_inputs = crossover.make_inputs
    monkeypatch.setattr(crossover, "make_inputs", recorded)
    monkeypatch.setattr(crossover, "time_ways", lambda *_: dict.fromkeys((*crossover.WAYS, crossover.CHOSEN)))
    monkeypatch.setattr(crossover, "draw", lambda *_: None)
    arguments = ["--device", "cpu", "--kernel", str(kernel_dir), "--out", str(tmp_path), "--rows", "256"]
    assert crossover.main([*arguments, "--shape", "64", "32", "128", "8", "--imbalance", str(imbalance)]) == 0
    rows = drawn[-1].top_k_index.flatten().bincount(minlength=128).sort(descending=True).values
    assert least <= rows[:16].sum() / rows.sum() <= most


def test_a_run_leaves_its_times_and_a_picture(kernel_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(crossover, "ROOM", 1e9)  # on a CPU all ways are the reference, and noise decides
    arguments = ["--device", "cpu", "--kernel", str(kernel_dir), "--out", str(tmp_path), "--budget-ms", "1"]
    assert crossover.main([*arguments, "--shape", "64", "64", "4", "2", "--rows", "1", "8"]) == 0
    result = json.loads((tmp_path / "crossover.json").read_text())
    times = result["times"]
    assert result["complete"] and {path.name for path in tmp_path.iterdir()} == {"crossover.json", "crossover.png"}
    assert [(r["tokens"], r["pass"]) for r in times] == [(t, p) for t in (1, 2, 16) for p in ("forward", "frozen")]
    assert crossover.plt.imread(tmp_path / "crossover.png").std() > 0.05
