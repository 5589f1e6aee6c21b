"""The Triton kernels in Triton's interpreter: the tests of ``interpreted/``, in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

INTERPRETED = Path(__file__).parent / "interpreted"


def test_the_triton_kernels_hold_in_the_interpreter(kernel_dir):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--kernel-dir", str(kernel_dir), str(INTERPRETED)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout
