"""Publishes the kernel on the Hub: builds it, lays out what goes to each branch, and commits that.

    python scripts/publish_kernel.py [--source .] [--repo-id org/name] [--tag v1] [--dry-run FOLDER]

| branch            | holds                                                      |
| ----------------- | ---------------------------------------------------------- |
| ``v<version>``    | ``build/`` and ``benchmarks/benchmark*.py``, nothing else  |
| ``main``          | ``README.md``, rendered from ``CARD.md``                   |

Each branch gets one commit that makes it equal to its folder, so a user never meets half an upload, and a commit that
someone pinned stays what it was. Only what a commit holds is published: a build's metadata names its commit, and so
does the message of each branch's commit. ``--tag`` is the git tag that asks for it, whose version must be build.toml's.
``HF_TOKEN`` and ``HF_ENDPOINT`` say who publishes and where, as everywhere in huggingface_hub. It takes the packages of
requirements-publish.txt: ``make publish`` sees to that.
"""

import argparse
import ast
import re
import shutil
import sys
import tempfile
from pathlib import Path

import jinja2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError

from build_kernel import SOURCES, BuildError, build, changed, package_folder, read_config, read_revision, smoke_test
from kernel_rules import literal_all

CARD, BENCHMARKS = "CARD.md", "benchmarks/benchmark*.py"  # what is published beside the build


class PublishError(Exception):
    """What is to be published is not what a commit holds."""


def lay_out(source: Path, repo_id: str, folder: Path) -> dict[str, Path]:
    """Writes what goes to each branch of ``repo_id`` below ``folder`` and returns {branch: its folder}.

    Raises:
        PublishError: ``source`` is not a clean git checkout.
        BuildError: it does not build or does not load.
    """
    revision = read_revision(source)
    if revision.commit is None:
        raise PublishError(f"{source} is not the top of a git checkout: the build could not say what it was made from")
    if changes := changed(source, *SOURCES, CARD, BENCHMARKS):
        raise PublishError(f"{source} differs from its commit {revision.commit[:7]}: commit this first:\n{changes}")
    main, version = folder / "main", folder / f"v{read_config(source)['general']['version']}"
    main.mkdir(parents=True)
    (main / "README.md").write_text(render_card(source, repo_id))
    build(source, version / "build")
    smoke_test(version)
    for path in benchmark_files(source):
        (version / "benchmarks").mkdir(exist_ok=True)
        shutil.copyfile(path, version / "benchmarks" / path.name)
    return {version.name: version, "main": main}


def check_tag(tag: str, version: int) -> None:
    """A version's first build is tagged v<version>, later ones v<version>.<number>.

    Raises:
        PublishError: ``tag`` asks for something else than ``version``.
    """
    if not re.fullmatch(rf"v{version}(\.\d+)?", tag):
        raise PublishError(f"tag {tag!r} is not for version {version} of build.toml: v{version} or v{version}.<number>")


def publish(trees: dict[str, Path], repo_id: str, message: str) -> dict[str, str]:
    """Makes each branch of the kernel repository equal to its folder and returns {branch: commit}."""
    api = HfApi()
    kernel = {"repo_id": repo_id, "repo_type": "kernel"}
    api.create_repo(**kernel, exist_ok=True)
    commits = {}
    for branch, tree in trees.items():
        if branch != "main":
            api.create_branch(**kernel, branch=branch, exist_ok=True)
        files = {path.relative_to(tree).as_posix(): path for path in tree.rglob("*") if path.is_file()}
        stale = set(api.list_repo_files(**kernel, revision=branch)) - set(files) - {".gitattributes"}
        operations = [
            *(CommitOperationAdd(name, path) for name, path in sorted(files.items())),
            *(CommitOperationDelete(name) for name in sorted(stale)),
        ]
        commit = api.create_commit(**kernel, operations=operations, commit_message=message, revision=branch)
        commits[branch] = commit.oid
    return commits


def render_card(source: Path, repo_id: str) -> str:
    """CARD.md with the names and flags that ``kernel-builder`` fills in."""
    general, package = read_config(source)["general"], package_folder(source)
    names = literal_all(ast.parse((package / "__init__.py").read_text()))
    classes = [node for node in ast.parse((package / "layers.py").read_text()).body if isinstance(node, ast.ClassDef)]
    environment = jinja2.Environment(trim_blocks=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.from_string((source / CARD).read_text()).render(
        repo_id=repo_id,
        version=general["version"],
        license=general["license"].lower(),
        functions=[name for name in names if name != "layers"],
        layers=[layer.name for layer in classes],
        has_benchmark=bool(benchmark_files(source)),
        upstream=general.get("upstream"),
        source=general.get("source"),
    )


def benchmark_files(source: Path) -> list[Path]:
    """The scripts that ``kernels benchmark`` runs."""
    return sorted(source.glob(BENCHMARKS))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, default=root, help="folder of build.toml (default: this repository)")
    parser.add_argument("--repo-id", help="where to publish (default: repo-id of build.toml)")
    parser.add_argument("--tag", help="refuse unless this git tag is v<version> or v<version>.<number>")
    parser.add_argument("--dry-run", type=Path, metavar="FOLDER", help="write the branches there and upload nothing")
    return parser.parse_args(argv)


def main() -> None:
    arguments = parse()
    try:
        general = read_config(arguments.source)["general"]
        if arguments.tag is not None:
            check_tag(arguments.tag, general["version"])
        repo_id = arguments.repo_id or general["hub"]["repo-id"]
        with tempfile.TemporaryDirectory() as scratch:
            trees = lay_out(arguments.source, repo_id, arguments.dry_run or Path(scratch))
            if arguments.dry_run:
                for branch, tree in trees.items():
                    print(f"{repo_id} {branch}: {tree}")
                return
            message = f"Build of {read_revision(arguments.source).commit}"
            for branch, commit in publish(trees, repo_id, message).items():
                print(f"{repo_id} {branch}: {commit}")
    except (PublishError, BuildError, HfHubHTTPError, FileExistsError, ValueError) as error:
        sys.exit(f"publish_kernel.py: {error}")


if __name__ == "__main__":
    main()
