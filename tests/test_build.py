"""scripts/build_kernel.py writes what kernel-builder would, and refuses what the Hub could not serve."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kernels._rust import Digest, DigestAlgorithm, DigestValidationError, Metadata

from tests.conftest import ROOT

import build_kernel
from kernel_rules import violations

PACKAGE = "torch-ext/qwen3_moe_fused"
OPS_IMPORT = "from ._ops import add_op_namespace_prefix\n"


@pytest.fixture
def source(tmp_path) -> Path:
    """A copy of the sources, outside git."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "torch-ext", tmp_path / "source/torch-ext", ignore=ignore)
    shutil.copyfile(ROOT / "build.toml", tmp_path / "source/build.toml")
    return tmp_path / "source"


def git(folder: Path, *arguments: str) -> str:
    words = ["git", "-C", str(folder), "-c", "user.name=Author", "-c", "user.email=author@localhost", *arguments]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()


def commit(folder: Path) -> str:
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message=Release")
    return git(folder, "rev-parse", "HEAD")


def metadata(variant: Path) -> dict:
    return json.loads((variant / "metadata.json").read_text())


def test_a_variant_is_the_sources_of_the_wanted_kinds_and_two_files_of_the_build(source, tmp_path):
    (source / PACKAGE / "notes.txt").write_text("not for the Hub")
    (source / PACKAGE / "configs").mkdir(exist_ok=True)
    (source / PACKAGE / "configs/card.json").write_text("{}")
    variants = build_kernel.build(source, tmp_path / "build")
    assert [variant.name for variant in variants] == ["torch-cpu", "torch-cuda"]
    for variant in variants:
        built = {path.relative_to(variant): path.read_bytes() for path in variant.rglob("*") if path.is_file()}
        files = [path for path in (source / PACKAGE).rglob("*") if path.suffix in (".py", ".json")]
        expected = {path.relative_to(source / PACKAGE): path.read_bytes() for path in files}
        generated = {path: built.pop(path) for path in (Path("_ops.py"), Path("metadata.json"))}
        assert built == expected
        assert all(generated.values())


def test_metadata_parses_and_its_digest_covers_every_file(source, tmp_path):
    for variant in build_kernel.build(source, tmp_path / "build"):
        parsed = Metadata.read_from_file(variant / "metadata.json")
        assert (str(parsed.name), parsed.version, parsed.license) == ("qwen3-moe-fused", 1, "Apache-2.0")
        assert f"torch-{str(parsed.backend.backend_type).lower()}" == variant.name
        assert parsed.python_depends == [] and parsed.kernel_depends == []
        digest = Digest.hash_variant(DigestAlgorithm.SHA256, variant)
        parsed.digest.validate(digest)
        files = {path.relative_to(variant).as_posix() for path in variant.rglob("*") if path.is_file()}
        assert set(digest.files) == files - {"metadata.json"}


def test_a_changed_file_fails_the_digest(source, tmp_path):
    variant = build_kernel.build(source, tmp_path / "build")[0]
    with (variant / "layers.py").open("a") as file:
        file.write("# tampered\n")
    with pytest.raises(DigestValidationError):
        Metadata.read_from_file(variant / "metadata.json").digest.validate(
            Digest.hash_variant(DigestAlgorithm.SHA256, variant)
        )


def test_a_result_that_kernels_would_refuse_is_refused_here(source, tmp_path, monkeypatch):
    """Were the digest that of some other files."""
    digest, folders = build_kernel._digest, [source]
    monkeypatch.setattr(build_kernel, "_digest", lambda variant: digest(folders.pop() if folders else variant))
    with pytest.raises(DigestValidationError):
        build_kernel.build(source, tmp_path / "build")
    assert not (tmp_path / "build").exists()


def test_only_the_cuda_variant_names_gpu_generations(source, tmp_path):
    cpu, cuda = map(metadata, build_kernel.build(source, tmp_path / "build"))
    assert "archs" not in cpu["backend"]
    assert cuda["backend"]["archs"][0] == "8.0"


def test_a_clean_commit_names_the_ops_and_the_provenance(source, tmp_path):
    head = commit(source)
    for variant in build_kernel.build(source, tmp_path / "build"):
        backend = variant.name.removeprefix("torch-")
        namespace = f"_qwen3_moe_fused_{backend}_{head[:7]}"
        assert metadata(variant)["id"] == namespace
        assert f'"{namespace}"' in (variant / "_ops.py").read_text()
        assert metadata(variant)["provenance"]["kernel"] == {"commit": head, "dirty": False}


@pytest.mark.parametrize("changed", [f"{PACKAGE}/layers.py", f"{PACKAGE}/new.py", "build.toml", "scripts/new.py"])
def test_sources_that_differ_from_the_commit_are_marked_dirty(source, tmp_path, changed):
    head = commit(source)
    (source / changed).parent.mkdir(exist_ok=True)
    (source / changed).open("a").write("\n")
    variant = build_kernel.build(source, tmp_path / "build")[0]
    assert metadata(variant)["id"] == f"_qwen3_moe_fused_cpu_{head[:7]}_dirty"
    assert metadata(variant)["provenance"]["kernel"]["dirty"] is True


def test_outside_git_the_content_names_the_ops_and_no_commit_is_claimed(source, tmp_path):
    first = metadata(build_kernel.build(source, tmp_path / "first")[0])
    again = metadata(build_kernel.build(source, tmp_path / "again")[0])
    (source / PACKAGE / "layers.py").open("a").write("\n")
    changed = metadata(build_kernel.build(source, tmp_path / "changed")[0])
    assert first["id"] == again["id"] != changed["id"]
    assert "kernel" not in first["provenance"]


def test_a_failed_build_leaves_the_previous_one_as_it_was(source, tmp_path):
    out = tmp_path / "out/build"
    build_kernel.build(source, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (source / PACKAGE / "layers.py").open("a").write("import numpy\n")
    with pytest.raises(build_kernel.BuildError, match="imports numpy"):
        build_kernel.build(source, out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert list(out.parent.iterdir()) == [out]


def test_an_unknown_field_in_build_toml_is_refused(source, tmp_path):
    build_toml = source / "build.toml"
    build_toml.write_text(build_toml.read_text().replace("[general]\n", '[general]\ncolour = "red"\n'))
    with pytest.raises(ValueError, match="colour"):
        build_kernel.build(source, tmp_path / "build")


def test_command_builds_loads_and_reports(source, tmp_path):
    words = [sys.executable, str(ROOT / "scripts/build_kernel.py"), "--source", str(source)]
    run = subprocess.run(words, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "torch-cpu (_qwen3_moe_fused_cpu_" in run.stdout and "torch-cuda (_qwen3_moe_fused_cuda_" in run.stdout
    assert f"loaded from {source / 'build'}" in run.stdout


def test_command_reports_a_kernel_that_does_not_load(source):
    (source / PACKAGE / "layers.py").open("a").write("raise RuntimeError('broken on import')\n")
    words = [sys.executable, str(ROOT / "scripts/build_kernel.py"), "--source", str(source)]
    run = subprocess.run(words, capture_output=True, text=True, env=os.environ)
    assert run.returncode == 1
    assert "does not load" in run.stderr and "broken on import" in run.stderr


def test_the_package_keeps_every_rule():
    assert violations(ROOT / PACKAGE) == []


@pytest.mark.parametrize(
    ("name", "code", "complaint"),
    [
        ("a.py", "import numpy\n", "a.py:1 imports numpy"),
        ("a.py", "from triton_kernels import x\n", "a.py:1 imports triton_kernels"),
        ("a.py", "def f():\n    import bitsandbytes\n", "a.py:2 imports bitsandbytes"),
        ("a.py", "from qwen3_moe_fused import layers\n", "a.py:1 imports qwen3_moe_fused"),
        ("sub/a.py", "from ... import b\n", "sub/a.py:1 imports from above the package"),
        ("a.py", "match 1:\n    case 1:\n        pass\n", "is not Python 3.9"),
        ("_ops.py", "", "_ops.py:1 is written by the build"),
        ("__init__.py", "__all__ = sorted(['a'])\n", "__init__.py:1 must assign __all__ a literal list"),
        ("__init__.py", "__all__ = ['gone']\n", "__init__.py:1 lists 'gone' in __all__"),
        ("a.py", "@torch.library.custom_op('ns::a')\ndef f(): pass\n", "a.py:1 must name its op with"),
        ("a.py", "torch.library.register_fake('ns::a', f)\n", "a.py:1 must name its op with"),
        ("a.py", "torch.library.triton_op(name())(f)\n", "a.py:1 must name its op with"),
        ("a.py", OPS_IMPORT + "lib = torch.library.Library('ns', 'DEF')\n", "a.py:2 must define ops with"),
        ("a.py", "torch.library.custom_op(add_op_namespace_prefix('a'))(f)\n", "a.py:1 must import"),
        ("a.py", "from ._ops import add_op_namespace_prefix as p\n", "a.py:1 must take add_op_namespace_prefix"),
        (
            "a.py",
            "try:\n    " + OPS_IMPORT + "except ImportError:\n    pass\n",
            "a.py:2 must take",
        ),
        ("a.py", "def add_op_namespace_prefix(n): return n\n", "a.py:1 must take add_op_namespace_prefix"),
        ("a.py", "@op.register_kernel('cpu')\ndef f(): pass\n", "a.py:1 must call register_kernel"),
        ("layers.py", "class L(nn.Module):\n    def __init__(self): pass\n", "layers.py:2 layer L may hold"),
        ("layers.py", "class L(nn.Module):\n    scale = 2.0\n", "layers.py:2 layer L may hold"),
        ("layers.py", "class L(Base):\n    def forward(self): pass\n", "layers.py:1 layer L must derive"),
    ],
)
def test_each_rule_is_noticed_when_broken(tmp_path, name, code, complaint):
    path = tmp_path / "package" / name
    path.parent.mkdir(parents=True)
    path.write_text(code)
    found = violations(tmp_path / "package")
    assert len(found) == 1, found
    assert complaint in found[0], found


def test_what_the_rules_allow_is_allowed(tmp_path):
    (tmp_path / "a.py").write_text(
        "import math\nimport torch\nimport triton.language as tl\nfrom torch import nn\n"
        + OPS_IMPORT
        + "from . import b\n"
        "@torch.library.custom_op(add_op_namespace_prefix('a'), mutates_args=())\ndef op(x): return x\n"
        "op.register_kernel('cpu')(op)\n@op.register_fake\ndef _(x): return x\n"
    )
    (tmp_path / "layers.py").write_text(
        "from torch import nn\nclass L(nn.Module):\n    'Doc.'\n    has_backward: bool = True\n    gate: nn.Module\n"
        "    can_torch_compile = True\n    def forward(self, x): return x\ndef helper(): pass\n"
    )
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a.py").write_text("from .._ops import add_op_namespace_prefix\nfrom ..layers import L\n")
    assert violations(tmp_path) == []
