"""Tensor and expert parallelism as Transformers does them: the experts interface gets each rank's own weights."""

import os
import subprocess
import sys

from tests.conftest import ROOT
from tests.integration.models import QWEN3


def test_sharded_experts_train_as_stock_on_two_ranks(kernel_dir, tmp_path):
    QWEN3.build().save_pretrained(tmp_path)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    program = ["-m", "tests.integration.parallel", str(tmp_path), str(kernel_dir)]
    paths = [str(ROOT), str(ROOT / "integration"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    run = subprocess.run(launch + program, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    for line in ("rank 0: tensor parallel", "rank 1: tensor parallel", "rank 0: expert parallel"):
        assert f"{line} as stock" in run.stdout
