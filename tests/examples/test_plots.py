"""The pictures of a run."""

import pytest
import torch

from tests.conftest import ROOT


def test_the_clock_counts_steps_and_no_pauses(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import plots
    from transformers import TrainerControl, TrainerState

    log, save = TrainerControl(should_log=True), TrainerControl(should_save=True)
    steps = [TrainerControl(), log, save, log]
    now = iter([0.0, 4.0, 100.0, 103.0, 500.0, 501.0])  # begins and ends: two steps, then one that is saved, then one
    monkeypatch.setattr(plots.time, "perf_counter", lambda: next(now))
    clock = plots.Clock(tokens_a_step=8)
    for number, control in enumerate(steps, 1):
        clock.on_step_begin(None, None, control)
        clock.on_step_end(None, None, control)
        if control.should_log:
            clock.on_log(None, TrainerState(global_step=number), control)
    clock.on_log(None, TrainerState(global_step=4), log)  # an evaluation's entry: no step since the last
    assert clock.points == [(2, 4.0), (4, 4.0)]


@pytest.mark.gpu
def test_the_clock_waits_for_the_gpu_before_it_looks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import plots
    from transformers import TrainerControl, TrainerState

    clock, control = plots.Clock(tokens_a_step=1), TrainerControl(should_log=True)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    clock.on_step_begin(None, None, control)
    begin.record()
    torch.cuda._sleep(10**9)
    end.record()
    clock.on_step_end(None, None, control)
    clock.on_log(None, TrainerState(global_step=1), control)
    assert 1e3 / clock.points[0][1] >= begin.elapsed_time(end) > 100
