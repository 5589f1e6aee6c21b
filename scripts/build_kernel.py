"""Builds the kernel package without nix: the same ``build/torch-<backend>`` that ``kernel-builder build`` writes.

    python scripts/build_kernel.py [--source .] [--out build]

A variant is the package's sources filtered by ``pyext``, an ``_ops.py`` that names this build's own op namespace, and
a ``metadata.json`` with the digest of every file and the commit they came from. The build is made in a temporary
folder and moved into place when it is complete and valid, so ``--out`` never holds half of one.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

import kernels
from kernels._rust import Build, Digest, DigestAlgorithm, Metadata

from kernel_rules import violations

SOURCES = ("build.toml", "torch-ext", "scripts")  # whatever a build is made from
ARCHS = {"cuda": "cuda_capabilities", "rocm": "rocm_archs"}
OPS = '''import torch

_OPS_NAME = "{namespace}"

ops = getattr(torch.ops, _OPS_NAME)


def add_op_namespace_prefix(op_name: str) -> str:
    """The op's name in the namespace of this build, so that several builds can be loaded in one process."""
    return f"{{_OPS_NAME}}::{{op_name}}"
'''


class BuildError(Exception):
    """The sources break a rule, or the build does not load."""


@dataclass(frozen=True)
class Revision:
    """What the sources are: the commit they came from, None outside git, and whether they differ from it."""

    commit: str | None
    dirty: bool
    content: str

    @property
    def unique_id(self) -> str:
        """Names the op namespace: 7 hex digits of the commit, of the sources' own hash outside git."""
        return f"{(self.commit or self.content)[:7]}{'_dirty' if self.dirty else ''}"

    @property
    def provenance(self) -> dict:
        builder = {"kernel-builder": {"version": f"{kernels.__version__}+build_kernel"}}
        return builder | ({"kernel": {"commit": self.commit, "dirty": self.dirty}} if self.commit else {})


def read_config(source: Path) -> dict:
    """build.toml, which ``kernels`` has found valid.

    Raises:
        ValueError: what is wrong with it.
    """
    Build.open(source)
    return tomllib.loads((source / "build.toml").read_text())


def package_folder(source: Path) -> Path:
    """Where the package's sources are."""
    return source / "torch-ext" / read_config(source)["general"]["name"].replace("-", "_")


def read_revision(source: Path) -> Revision:
    """The revision of ``source``; git's answer counts only when ``source`` is the top of its own checkout."""
    files = [path for path in package_folder(source).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    content = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()
    if not (source / ".git").exists():
        return Revision(None, False, content)
    return Revision(_git(source, "rev-parse", "HEAD"), bool(changed(source, *SOURCES)), content)


def changed(source: Path, *paths: str) -> str:
    """Which of ``paths``, or of what is below them, differs from the commit or is not in it, as git says it."""
    return _git(source, "status", "--porcelain", "--", *paths)


def build(source: Path, out: Path) -> list[Path]:
    """Builds every backend of ``source``'s build.toml into ``out`` and returns the variants' paths.

    Raises:
        ValueError: build.toml is not valid.
        BuildError: the sources break a rule of ``kernel_rules``.
    """
    config, package = read_config(source), package_folder(source)
    found = violations(package) if (package / "__init__.py").is_file() else ["__init__.py:1 does not exist"]
    if found:
        raise BuildError("\n".join([f"{package} breaks {len(found)} rules of kernel packages:", *found]))
    revision = read_revision(source)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        complete = Path(scratch) / out.name
        for backend in config["general"]["backends"]:
            _write_variant(complete / f"torch-{backend}", backend, package, config, revision)
        if out.exists():
            out.rename(Path(scratch) / "previous")
        complete.rename(out)
    return sorted(out.iterdir())


def smoke_test(kernel_dir: Path) -> None:
    """Loads the build that fits this machine in a process of its own, as ``get_local_kernel`` does for a user.

    Raises:
        BuildError: with the traceback, if it does not load.
    """
    code = "import sys, pathlib, kernels; kernels.get_local_kernel(pathlib.Path(sys.argv[1])).layers"
    run = subprocess.run([sys.executable, "-c", code, str(kernel_dir)], capture_output=True, text=True)
    if run.returncode:
        raise BuildError(f"{kernel_dir} does not load:\n{run.stderr}")


def _write_variant(variant: Path, backend: str, package: Path, config: dict, revision: Revision) -> None:
    general, noarch = config["general"], config["torch-noarch"]
    extensions = noarch.get("pyext", ["py", "pyi"])
    for path in sorted(package.rglob("*")):
        if path.is_file() and path.suffix[1:] in extensions and "__pycache__" not in path.parts:
            target = variant / path.relative_to(package)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    namespace = f"_{package.name}_{backend}_{revision.unique_id}"
    (variant / "_ops.py").write_text(OPS.format(namespace=namespace))
    archs = noarch.get(ARCHS.get(backend))
    metadata = {
        "name": general["name"],
        "id": namespace,
        "version": general["version"],
        "license": general["license"],
        **{key: general[key] for key in ("upstream", "source") if key in general},
        "python-depends": general.get("python-depends", []),
        "kernel-depends": general.get("kernel-depends", []),
        "backend": {"type": backend} | ({"archs": archs} if archs else {}),
        "digest": {"algorithm": "sha256", "files": dict(sorted(_digest(variant).files.items()))},
        "provenance": revision.provenance,
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    Metadata.read_from_file(variant / "metadata.json").digest.validate(_digest(variant))


def _digest(variant: Path) -> Digest:
    return Digest.hash_variant(DigestAlgorithm.SHA256, variant)


def _git(source: Path, *arguments: str) -> str:
    run = subprocess.run(["git", "-C", str(source), *arguments], capture_output=True, text=True)
    if run.returncode:
        raise BuildError(f"git {' '.join(arguments)} in {source}: {run.stderr.strip()}")
    return run.stdout.strip()


def main(argv: list[str] | None = None) -> None:
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, default=root, help="folder of build.toml (default: this repository)")
    parser.add_argument("--out", type=Path, help="folder for the variants (default: build in --source)")
    arguments = parser.parse_args(argv)
    out = arguments.out or arguments.source / "build"
    try:
        for variant in build(arguments.source, out):
            print(f"built {variant} ({Metadata.read_from_file(variant / 'metadata.json').id})")
        smoke_test(out)
        print(f"loaded from {out}")
    except (BuildError, ValueError) as error:
        sys.exit(f"build_kernel.py: {error}")


if __name__ == "__main__":
    main()
