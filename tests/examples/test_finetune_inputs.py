"""What finetune.py makes of its arguments and of the files that it is given."""

import json
import re
from pathlib import Path
from types import ModuleType

import pytest
from datasets import Dataset

from tests.conftest import ROOT


@pytest.fixture
def finetune(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import finetune

    return finetune


@pytest.mark.parametrize(
    ("option", "value", "least"),
    [("steps", 0, 1), ("seq-len", 1, 2), ("batch-size", 0, 1), ("rank", 0, 1), ("expert-rank", -1, 0)],
)
def test_a_number_that_cannot_be_meant_is_refused(finetune, capsys, option, value, least):
    with pytest.raises(SystemExit):
        finetune.parse([f"--{option}={value}"])
    assert f"argument --{option}: must be at least {least}, got {value}" in capsys.readouterr().err
    assert getattr(finetune.parse([f"--{option}={least}"]), option.replace("-", "_")) == least


def test_help_names_every_default(finetune, capsys):
    with pytest.raises(SystemExit):
        finetune.parse(["--help"])
    printed = " ".join(capsys.readouterr().out.partition("options:")[2].split())
    told = dict(re.findall(r"--([a-z-]+) (?:(?!--[a-z]).)*?default: (\S+?)[);]* ", printed))
    wanted = {"steps": "150", "rank": "16", "trainer": "trainer", "bits": "4", "save-every": "50", "report-to": "none"}
    assert {name: told[name] for name in wanted} == wanted


def test_a_document_may_hold_any_character(finetune, tmp_path):
    """Some end a line for Python, and none of these does for JSON."""
    documents = ["one\u2028two\x85three", "four\nfive\u2029", "six"]
    path = tmp_path / "notes.jsonl"
    path.write_bytes("\r\n\n".join(json.dumps({"text": x}, ensure_ascii=False) for x in documents).encode())
    assert finetune.read_texts(str(path), "text") == documents


@pytest.mark.parametrize("document", [None, 5, ["one", "two"]])
def test_a_document_that_is_no_text_is_refused_by_its_place(finetune, tmp_path, monkeypatch, document):
    path = tmp_path / "notes.jsonl"
    path.write_text(json.dumps({"body": "one"}) + "\n" + json.dumps({"body": document}))
    wanted = "'body': wants a string, got " + repr(document).replace("[", r"\[")
    with pytest.raises(SystemExit, match=rf"--dataset {path}, line 2, {wanted}"):
        finetune.read_texts(str(path), "body")
    rows = Dataset.from_dict({"body": [document, document]})
    monkeypatch.setattr("documents.load_dataset", lambda *_, **__: rows)
    with pytest.raises(SystemExit, match=rf"--dataset some/dataset, row 0, {wanted}"):
        finetune.read_texts("some/dataset", "body")


def test_a_run_goes_on_from_the_newest_checkpoint_that_is_complete(finetune, tmp_path):
    """By number, not by name. The others are no checkpoint, without a state, or have one that was cut short."""

    options = finetune.parse(["--output", str(tmp_path), "--resume"])

    def add(name: str, state: str | None) -> Path:
        folder = tmp_path / "checkpoints" / name
        folder.mkdir(parents=True)
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
        return folder

    for name, state in (("checkpoint-200", None), ("checkpoint-150", '{"best'), ("checkpoint-130", "{}")):
        add(name, state)
    add("checkpoint-120", "")
    with pytest.raises(SystemExit, match=f"--resume: there is no complete checkpoint in {tmp_path}/checkpoints"):
        finetune.checkpoint_to_resume(options)
    add("checkpoint-90", '{"global_step": 90}')
    complete = add("checkpoint-100", '{"global_step": 100}')
    assert finetune.checkpoint_to_resume(options) == complete
