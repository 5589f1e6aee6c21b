"""The sweep over the ways to multiply 4-bit experts: what it calls slower, and that it forces what it says."""

import importlib
import json

import crossover
import pytest


def record(**medians):
    times = {way: median and {"median": median} for way, median in medians.items()}
    return {"tokens": 16, "rows": 1.0, "pass": "forward", "ms": times}


@pytest.mark.parametrize(("chosen", "found"), [(1.0, 0), (1.02, 0), (1.04, 1)])
def test_three_percent_over_the_fastest_is_slower(chosen, found):
    slower = crossover.slower([record(fast=1.0, plain=2.0, dequantize=None, chosen=chosen)])
    assert len(slower) == found
    assert all(place["fastest"] == "fast" and place["ratio"] == pytest.approx(chosen) for place in slower)


def test_each_way_is_forced_and_the_choice_given_back(kernel):
    regime = importlib.import_module(f"{kernel.__name__}.regime")
    before, seen = regime.regime, []
    options = crossover.parse(["--device", "cpu", "--budget-ms", "1"])
    for way in (*crossover.WAYS, crossover.CHOSEN):
        assert crossover.time_way(kernel, way, lambda: seen.append(regime.regime), options)["calls"] >= 2
        assert regime.regime is before
        assert (seen[-1] is before) == (way == crossover.CHOSEN)
        assert way == crossover.CHOSEN or seen[-1]() == way


def test_a_run_leaves_its_times_and_a_picture(kernel_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(crossover, "ROOM", 1e9)  # on a CPU all ways are the reference, and noise decides
    arguments = ["--device", "cpu", "--kernel", str(kernel_dir), "--out", str(tmp_path), "--budget-ms", "1"]
    assert crossover.main([*arguments, "--shape", "64", "64", "4", "2", "--rows", "1", "8"]) == 0
    times = json.loads((tmp_path / "crossover.json").read_text())["times"]
    assert [(r["tokens"], r["pass"]) for r in times] == [(t, p) for t in (1, 2, 16) for p in ("forward", "frozen")]
    assert crossover.plt.imread(tmp_path / "crossover.png").std() > 0.05
