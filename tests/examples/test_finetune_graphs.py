"""finetune.py's layers in graphs keep, and offload, what its options say or its plan."""

from types import SimpleNamespace

import pytest

from tests.conftest import ROOT


class ReachedError(Exception):
    """A run is where the test wanted it."""


@pytest.mark.parametrize("planned", [False, True])
def test_graphs_keep_and_offload_what_the_options_or_the_plan_say(kernel_dir, tmp_path, monkeypatch, planned):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import finetune

    got = []

    def enable(model, **what) -> None:
        got.append(what)
        raise ReachedError

    monkeypatch.setattr(finetune, "enable_graphed_checkpointing", enable)
    step = SimpleNamespace(keep=("experts",), offload=("experts",))
    monkeypatch.setattr(finetune, "check", lambda options: SimpleNamespace(step=step) if planned else None)
    arguments = ["--kernel", str(kernel_dir), "--output", str(tmp_path), "--gradient-checkpointing", "--graphs"]
    arguments += ["--keep", "attention", "experts", "--offload", "attention"]
    with pytest.raises(ReachedError):
        finetune.train(finetune.parse(arguments))
    wanted = (["experts"], ["experts"]) if planned else (["attention", "experts"], ["attention"])
    assert [(list(what["keep"]), list(what["offload"])) for what in got] == [wanted]
