"""What scripts/publish_kernel.py puts on the Hub."""

import json
import os
import shlex
import subprocess

import pytest
import yaml

from tests.conftest import ROOT
from tests.hub.conftest import REPO

import publish_kernel

WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/publish.yml").read_text())


def tree(repository, branch: str) -> dict[str, bytes]:
    commit = repository.resolve(branch)
    files = [entry["path"] for entry in repository.entries(commit, recursive=True) if entry["type"] == "file"]
    return {path: repository.read(commit, path)[1] for path in files if path != ".gitattributes"}


def folder(path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_branches_hold_what_a_dry_run_lays_out(hub, maintainer, v1, tmp_path):
    maintainer.run(maintainer.home / "v1", "--tag", "v1", "--dry-run", str(tmp_path / "trees")).check_returncode()
    for branch in ("v1", "main"):
        assert tree(hub.repository(REPO), branch) == folder(tmp_path / "trees" / branch)


def test_version_branch_holds_build_and_benchmarks_alone(hub, v1):
    paths = set(tree(hub.repository(REPO), v1))
    assert hub.repository(REPO).read(v1, ".gitattributes"), "the Hub's own, by which it stores files"
    sources = {path.relative_to(ROOT / "torch-ext/qwen3_moe_fused") for path in (ROOT / "torch-ext").rglob("*.py")}
    benchmarks = {f"benchmarks/{path.name}" for path in (ROOT / "benchmarks").glob("benchmark*.py")}
    builds = {
        f"build/torch-{backend}/{file}"
        for backend in ("cpu", "cuda")
        for file in {*map(str, sources), "_ops.py", "metadata.json"}
    }
    assert builds | benchmarks <= paths
    assert all(path.endswith(".json") for path in paths - builds - benchmarks)


def test_metadata_names_the_commit_that_was_built(hub, maintainer, v1):
    source = (maintainer.home / "v1/.git/refs/heads").iterdir()
    metadata = json.loads(tree(hub.repository(REPO), v1)["build/torch-cuda/metadata.json"])
    assert metadata["provenance"]["kernel"] == {"commit": next(source).read_text().strip(), "dirty": False}
    assert metadata["id"] == f"_qwen3_moe_fused_cuda_{metadata['provenance']['kernel']['commit'][:7]}"


def test_card_lists_the_public_functions_and_layers(hub, v1):
    card = tree(hub.repository(REPO), "main")["README.md"].decode()
    for name in ("fused_experts", "moe_fused_linear", "routing", "Qwen3MoeSparseMoeBlock", "Qwen3MoeExperts"):
        assert f"- `{name}`" in card
    assert "- `layers`" not in card
    assert f'get_kernel("{REPO}", version=1)' in card
    assert "{{" not in card and "{%" not in card


def test_publishing_the_same_again_commits_nothing(hub, maintainer, v1):
    before = hub.repository(REPO).branches()
    assert maintainer.publish(maintainer.home / "v1") == before


def test_a_newer_build_replaces_every_file_and_keeps_the_old_commit(hub, maintainer):
    source, repo_id = maintainer.checkout("newer"), "org/newer"
    extra = source / "torch-ext/qwen3_moe_fused/extra.py"
    extra.write_text('"""A module that the newer build lacks."""\n')
    maintainer.commit(source)
    old = maintainer.publish(source, repo_id)
    extra.unlink()
    maintainer.commit(source)
    new = maintainer.publish(source, repo_id)

    repository = hub.repository(repo_id)
    assert "build/torch-cuda/extra.py" in tree(repository, old["v1"])
    assert "build/torch-cuda/extra.py" not in tree(repository, new["v1"])
    assert old["main"] == new["main"], "the card did not change"


def _break(source, maintainer) -> None:
    (source / "torch-ext/qwen3_moe_fused/layers.py").open("a").write("raise RuntimeError('broken on import')\n")
    maintainer.commit(source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda source, _: (source / "torch-ext/qwen3_moe_fused/new.py").touch(), "differs from its commit"),
        (lambda source, _: (source / ".git").rename(source / "git"), "is not the top of a git checkout"),
        (_break, "broken on import"),
    ],
    ids=["uncommitted", "no git", "broken"],
)
def test_refuses_a_build_that_no_commit_holds_or_that_does_not_load(hub, maintainer, tmp_path, change, message):
    source = maintainer.checkout(tmp_path.name)
    change(source, maintainer)
    run = maintainer.run(source, "--repo-id", "org/refused")
    assert run.returncode == 1
    assert message in run.stderr
    assert not (hub.root / "org/refused.git").exists()


@pytest.mark.parametrize(
    "path",
    [
        "torch-ext/qwen3_moe_fused/layers.py",
        "build.toml",
        "scripts/new.py",
        "CARD.md",
        "benchmarks/benchmark_fused_experts.py",
        "benchmarks/benchmark_new.py",
    ],
)
def test_refuses_whatever_is_published_and_differs_from_the_commit(maintainer, tmp_path, path):
    source = maintainer.checkout(tmp_path.name)
    (source / path).parent.mkdir(exist_ok=True)
    with (source / path).open("a") as file:
        file.write("\n")
    with pytest.raises(publish_kernel.PublishError, match=f"differs from its commit.*\n.*{path.split('/')[0]}"):
        publish_kernel.lay_out(source, REPO, tmp_path / "trees")
    assert not (tmp_path / "trees").exists()


def test_refuses_the_tag_of_another_version(hub, maintainer, v1):
    run = maintainer.run(maintainer.home / "v1", "--repo-id", "org/refused", "--tag", "v2")
    assert run.returncode == 1 and "tag 'v2' is not for version 1 of build.toml" in run.stderr
    assert not (hub.root / "org/refused.git").exists()


@pytest.mark.parametrize("tag", ["1", "v", "v11", "v1.", "v1-rc", "xv1", "v1.2.3", ""])
def test_a_tag_is_the_version_and_maybe_a_number(tag):
    publish_kernel.check_tag("v1", 1)
    publish_kernel.check_tag("v12.10", 12)
    with pytest.raises(publish_kernel.PublishError, match="is not for version 1 "):
        publish_kernel.check_tag(tag, 1)


def test_the_workflow_gives_the_script_its_tag():
    """What it runs exists, and the script's parser reads what make would give it."""
    tests, publishes = [step["run"] for step in WORKFLOW["jobs"]["publish"]["steps"] if "run" in step]
    assert os.access(ROOT / tests, os.X_OK)
    assert publishes.startswith("make publish ")
    dry = publishes.replace("make", "make --dry-run --no-print-directory --assume-old .publish/ready", 1)
    printed = subprocess.run(
        ["bash", "-ec", dry],
        env=os.environ | {"GITHUB_REF_NAME": "v1.2"}, cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    _, _, script, *arguments = shlex.split(printed.splitlines()[-1])
    assert script == "scripts/publish_kernel.py"
    options = publish_kernel.parse(arguments)
    assert options.tag == "v1.2" and options.dry_run is None and options.repo_id is None


def test_without_a_token_nothing_is_published(hub, maintainer, v1):
    run = maintainer.run(maintainer.home / "v1", "--repo-id", "org/no-token", HF_TOKEN="hf_wrong")
    assert run.returncode == 1
    assert "401" in run.stderr
    assert not (hub.root / "org/no-token.git").exists()
