"""The committed results: each says how it was made."""

import json
import re

import pytest

from tests.conftest import ROOT

RESULTS = ROOT / "benchmarks/results"
WITHOUT_A_COMMAND = {
    "nvidia-h100/profile.json",  # of before profile_layer.py wrote one
    "nvidia-h100/train_step-8-layers-unsloth-kernel.json",  # of two runs, each of which has its own
}
PYTHON = r"(taskset -c \S+ )?python (-m pytest|\w+/\w+\.py)"
COMMAND = re.compile(rf"{PYTHON}|torchrun .* benchmarks/|^(\S+=1 )?make \w+", re.M)


def named(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(RESULTS)) for path in RESULTS.rglob(pattern))


@pytest.mark.parametrize("name", named("*.json"))
def test_a_result_has_its_command_or_says_why_not(name):
    result = json.loads((RESULTS / name).read_text())
    assert ("command" in result) == (name not in WITHOUT_A_COMMAND)
    assert COMMAND.match(result["command"]) if "command" in result else result["note"]


@pytest.mark.parametrize("name", [*named("*.md"), *named("*.txt")])
def test_a_table_or_note_has_its_command_or_says_why_not(name):
    text = (RESULTS / name).read_text()
    words = " ".join(text.split())
    assert COMMAND.search(text) or "by a script that is not kept" in words or "did not record its command" in words


@pytest.mark.parametrize("name", named("*.png"))
def test_a_picture_has_the_numbers_it_was_drawn_from(name):
    drawn = re.sub(r"(-time|-ratio|-memory)?\.png$", ".json", name)
    assert (RESULTS / drawn).is_file()
