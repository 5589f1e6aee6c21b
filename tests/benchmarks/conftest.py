"""The benchmarks are programs, not a package: their folder goes on the path as it does when one of them is run."""

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
