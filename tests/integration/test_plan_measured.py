"""The memory planner beside what benchmarks/train_step.py measured."""

import json
from collections.abc import Iterator
from types import ModuleType

import pytest

from tests.conftest import ROOT
from tests.integration.test_plan import PUBLISHED, model


def measured() -> Iterator:
    """Every committed run of benchmarks/train_step.py, but not those of stock libraries: its options, and what it
    took."""
    for path in sorted((ROOT / "benchmarks" / "results").glob("nvidia-*/train_step-*.json")):
        result = json.loads(path.read_text())
        _, script, *arguments = result.get("command", "python another").split()
        if script == "benchmarks/train_step.py" and not result["stock"]:
            for run in result["runs"]:
                yield pytest.param(arguments, run, id=f"{path.parent.name}-{path.stem}-{run['tokens']}")


RUNS = [*measured()]


@pytest.fixture
def train_step(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import train_step

    return train_step


@pytest.mark.parametrize(("arguments", "run"), RUNS)
def test_the_peak_is_within_5_percent_of_every_run_that_was_measured(train_step, arguments, run):
    """Without graphs of what PyTorch had allocated at most, with graphs of what it had reserved: their memory is
    nobody else's. What is planned is less the CUDA context, which PyTorch does not see."""
    options = train_step.parse(arguments)
    published = model(**PUBLISHED | dict(num_hidden_layers=options.layers))
    planned = train_step.planned_gib(published, options, run["tokens"])
    assert run["reserved_gib" if options.graphs else "peak_gib"] == pytest.approx(planned, rel=0.05)


def test_runs_were_measured_with_graphs_and_without_and_with_all_layers(train_step):
    runs = [train_step.parse(each.values[0]) for each in RUNS]
    assert {options.graphs for options in runs} == {True, False} and {options.layers for options in runs} >= {8, 48}
