"""The code blocks of README.md, run as they stand; a model that would be downloaded is replaced by a small one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def small_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "small"
    code = "import sys, pathlib, tiny_checkpoint; tiny_checkpoint.make_checkpoint(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT / "examples", check=True)
    return folder


def test_readme_has_its_uses():
    assert len(BLOCKS) == 2


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_the_block_runs(block, kernel_dir, small_model):
    if "Qwen/Qwen3-30B-A3B" in block:
        block = block.replace("Qwen/Qwen3-30B-A3B", str(small_model))
        block += "import torch; assert torch.isfinite(model(torch.arange(8)[None].to(model.device)).logits).all()\n"
    else:
        block += "assert out.shape == tokens.shape and torch.isfinite(out).all()\n"
    path = os.pathsep.join([str(ROOT / "integration"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"LOCAL_KERNELS": f"org/qwen3-moe-fused={kernel_dir}", "PYTHONPATH": path}
    run = subprocess.run([sys.executable, "-c", block], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
