"""The pictures of a run."""

import re
from types import SimpleNamespace

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


@pytest.mark.parametrize("graphs", [None, False, True])
def test_a_run_is_drawn_and_told_as_its_log_has_it(tmp_path, monkeypatch, capsys, graphs):
    """What was planned beside what PyTorch took, where there was a plan: 5 GiB, of which a context is 1."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import finetune
    import plots

    drawn, save = {}, plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: (drawn.update({path.name: figure}), save(figure, path)))
    monkeypatch.setattr(finetune, "ON_GPU", True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 4 * 2**30)
    log = [
        {"eval_loss": 7.0, "step": 0},
        {"loss": 6.5, "grad_norm": 1.0, "step": 2},
        {"loss": 5.5, "step": 4},
        {"eval_loss": 5.0, "step": 4},
        {"train_runtime": 1.0, "step": 4},
    ]
    parts = {"weights": 4 * 2**30, "CUDA context": 2**30}
    plan = None if graphs is None else finetune.Plan(SimpleNamespace(graphs=graphs), parts, 24 * 2**30, 4096)
    trainer, clock = (
        SimpleNamespace(state=SimpleNamespace(log_history=log)),
        SimpleNamespace(points=[(2, 8.0), (4, 9.0)]),
    )
    finetune.report(trainer, tmp_path, clock, 5.0, 1.5, plan)

    (losses,), (rates,) = (drawn[name].axes for name in ("loss.png", "throughput.png"))
    lines = {line.get_label(): [*map(tuple, line.get_xydata())] for line in losses.lines}
    assert lines == {"training": [(2, 6.5), (4, 5.5)], "held out": [(0, 7.0), (4, 5.0)]}
    assert {text.get_text() for text in losses.get_legend().get_texts()} == {*lines}
    assert [[*map(tuple, line.get_xydata())] for line in rates.lines] == [clock.points] and rates.get_ylim()[0] == 0
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in drawn)

    told = dict(re.findall(r"^(.{28}) (.+)$", capsys.readouterr().out, re.M))
    told = {name.strip(): value for name, value in told.items()}
    assert (told["loss before, held-out text"], told["loss after, held-out text"]) == ("7.0000", "5.0000")
    assert told["tokens a second, median"] == "8" and told["seconds, with evaluation"] == "1.5"
    assert (told["peak GPU memory"], told["reserved for that"]) == ("3072 MiB", "4096 MiB")
    planned = {name: value for name, value in told.items() if "planned" in name}
    kind = {None: {}, False: {"planned to be allocated": "4096 MiB"}, True: {"planned to be reserved": "4096 MiB"}}
    assert planned == kind[graphs]
