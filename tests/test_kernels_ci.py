"""What kernel-builder's CI runs (``nix run .#ci-test``): tests/ by the marker kernels_ci, with little else there."""

import os
import re
import shutil
import subprocess
import sys

import tomllib

from tests.conftest import ROOT

THERE = {"torch", "numpy", "kernels", "huggingface_hub", "pytest"}
PYPROJECT = """
[tool.pytest.ini_options]
markers = ["kernels_ci: mark a test as a kernel CI test"]
"""
"""Of the one that kernel-builder writes into its copy of the sources, what pytest reads."""


def test_the_marked_tests_pass_with_torch_kernels_and_pytest_alone(kernel_dir, device, tmp_path):
    """Its copy of the sources has build.toml and, of torch-ext and tests, the kinds of files that are published."""
    source = tmp_path / "source"
    kinds = tomllib.loads((ROOT / "build.toml").read_text())["torch-noarch"]["pyext"]
    for folder in ("torch-ext", "tests"):
        for path in (ROOT / folder).rglob("*.*"):
            if path.suffix[1:] in kinds:
                copy = source / path.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
    shutil.copyfile(ROOT / "build.toml", source / "build.toml")
    (source / "pyproject.toml").write_text(PYPROJECT)
    names = {line.partition("==")[0] for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line}
    absent = {name: None for name in {*names, "qwen3_moe_integration"} - THERE}  # which an import takes for missing
    (tmp_path / "absent.py").write_text(f"import sys\nsys.modules.update({absent})\n")
    environment = {**os.environ, "LOCAL_KERNELS": f"org/qwen3-moe-fused={kernel_dir}"}
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment |= {"PYTHONPATH": paths, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", str(source / "tests"), "-m", "kernels_ci", "-p", "no:cacheprovider"]
    settings = {"env": environment, "cwd": tmp_path, "capture_output": True, "text": True, "timeout": 600}
    run = subprocess.run([*command, "-p", "absent", "-k", device], **settings)
    assert run.returncode == 0, run.stdout + run.stderr
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) == 9 and "warning" not in run.stdout, run.stdout
