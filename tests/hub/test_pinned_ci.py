"""examples/pinned-ci as its README and its workflow say: locked, downloaded, tested, and refused when the lock is not
for this Hub; the guide to it, and what the README shows of it, block by block."""

import json
import os
import shutil

import pytest
import yaml

from tests.conftest import ROOT
from tests.documents import Block, blocks

EXAMPLE = ROOT / "examples/pinned-ci"


@pytest.fixture
def project(user):
    """The example in the user's home, as a clone of it would be."""
    ignore = shutil.ignore_patterns("__pycache__", ".pytest_cache", "*.egg-info")
    return shutil.copytree(EXAMPLE, user.home / "project", ignore=ignore)


def workflow_commands() -> list[str]:
    """What the CI workflow runs, but for installing packages."""
    steps = yaml.safe_load((EXAMPLE / ".github/workflows/ci.yml").read_text())["jobs"]["test"]["steps"]
    commands = [step["run"] for step in steps if "run" in step]
    assert commands[0].startswith("pip install")
    return commands[1:]


def without_commits(lock: str) -> list[dict]:
    entries = json.loads(lock)
    assert all(len(entry["lock"].pop("commit")) == 40 for entry in entries)
    return entries


def test_workflow_passes_once_the_project_is_locked_for_this_hub(user, project, v1):
    committed = (project / "kernels.lock").read_text()
    user.shell("kernels lock .", project)
    locked = (project / "kernels.lock").read_text()
    assert json.loads(locked)[0]["lock"]["commit"] == v1
    assert without_commits(locked) == without_commits(committed), "the committed lock is for the same dependencies"

    outputs = [user.shell(command, project) for command in workflow_commands()]
    assert len(outputs) == 2
    assert "3 passed" in outputs[-1]


def test_a_lock_for_another_hub_is_refused_and_nothing_else_is_loaded(user, project, hub, v1):
    commit = json.loads((project / "kernels.lock").read_text())[0]["lock"]["commit"]
    assert commit != v1
    asked = len(hub.requests)

    def program(project):
        import sys

        sys.path.insert(0, project)
        import moe_layer

        return moe_layer.kernel.__file__

    kind, message = user.error(program, str(project))
    assert kind == "RevisionNotFoundError"
    assert commit in message
    assert not any("/resolve/" in request for request in hub.requests[asked:])


GUIDE_BEGINS = """
from pathlib import Path
from tiny_checkpoint import make_checkpoint

Path("Qwen").mkdir()
make_checkpoint(Path("Qwen/Qwen3-30B-A3B"))
"""
GUIDE_ENDS = """
import torch

assert "/snapshots/{commit}/" in moe.__file__
layers = [module for module in model.modules() if type(module).__name__ == "Qwen3MoeSparseMoeBlock"]
assert {{module.forward.__func__.__module__ for module in layers}} == {{moe.layers.__name__}}
assert model(torch.arange(9, 17, device=model.device)[None]).logits.isfinite().all()
"""


def test_the_guide(user, tmp_path, v1):
    run_project(user, tmp_path, blocks(ROOT / "docs/pinned-ci.md"), GUIDE_BEGINS, GUIDE_ENDS.format(commit=v1))


def test_the_readme(user, tmp_path, v1):
    chosen = [block for block in blocks(ROOT / "README.md") if block.needs == "hub"]
    assert {block.language for block in chosen} == {"toml", "bash", "python"}
    run_project(user, tmp_path, chosen, "", f'assert "/snapshots/{v1}/" in moe.__file__')


def run_project(user, tmp_path, chosen: list[Block], begins: str, ends: str) -> None:
    """A folder with the TOML as its pyproject.toml, in which the commands run, then the Python between two others."""
    folder, program = tmp_path / "project", begins
    folder.mkdir()
    for block in chosen:
        if block.language == "toml":
            (folder / "pyproject.toml").write_text(block.code)
        elif block.language == "bash":
            user.shell(block.code, folder)
        else:
            program += block.code
    (folder / "program.py").write_text(program + ends)
    path = os.pathsep.join(map(str, (ROOT / "integration", ROOT / "examples", os.environ.get("PYTHONPATH", ""))))
    user.shell("python program.py", folder, PYTHONPATH=path)
