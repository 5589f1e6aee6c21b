"""trainer.py on a tiny model: the scripts run, and the table is what they printed."""

import json
import sys
from subprocess import PIPE, CompletedProcess
from types import SimpleNamespace

from tests import programs
from tests.conftest import ROOT


def run(command: list, **_) -> CompletedProcess:
    """In the place of ``subprocess.run``, whose processes would import the libraries five times."""
    python, script, *arguments = command
    assert python == sys.executable
    return programs.run(script, *arguments)


def test_the_scripts_train_and_generate(kernel_dir, tmp_path, monkeypatch):
    import trainer

    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setattr(trainer, "subprocess", SimpleNamespace(run=run, PIPE=PIPE))
    sizes = ["--tiny", "--layers", "1", "--seq-len", "64", "--steps", "2", "--new-tokens", "3", "--trainers", "trainer"]
    folders = ["--checkpoints", tmp_path, "--out", tmp_path, "--kernel", kernel_dir]
    trainer.main([*sizes, *map(str, folders)])
    result = json.loads((tmp_path / "trainer-1-layers.json").read_text())
    trained, *generated = result["runs"]
    assert trained["what"] == "finetune.py --trainer trainer"
    assert 5 < trained["loss_after"] < trained["loss_before"] < 7.5, "of 512 words, ln 512 is 6.2"
    ways = [[], ["--compile"], ["--adapter"], ["--adapter", "--compile"]]
    assert [run["what"].split()[1:] for run in generated] == ways
    assert all(run["tokens_per_second"] > 0 and run["peak_mib"] > 100 for run in result["runs"])
    assert all(run["prompt_tokens_per_second"] > 0 for run in generated)
    table = (tmp_path / "trainer-1-layers.md").read_text()
    assert f"| {trained['what']} | {trained['tokens_per_second']:.0f} |" in table and table.count("\n| gen") == 4
