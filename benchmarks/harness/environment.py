"""Where a run took place, and the two ceilings of its GPU, measured in the same run."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType

import torch

from .measure import summary, time_calls
from .peers import installed

PACKAGES = (
    *("torch", "triton", "transformers", "peft", "bitsandbytes", "trl", "kernels"),
    *("liger-kernel", "scattermoe", "unsloth"),
)


def environment(device: str) -> dict:
    today = datetime.now(timezone.utc).date().isoformat()
    found = {"date": today, "python": platform.python_version(), **{name: installed(name) for name in PACKAGES}}
    found["device"] = "CPU"
    found["torch"] = torch.__version__  # with the build it is, which the distribution's version may leave out
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "cuda": torch.version.cuda,
            "driver": _driver(),
        }
    return found


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    return subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.strip() or None


def kernel_identity(kernel: ModuleType) -> dict:
    """What the build says of itself: its id and the commit it came from."""
    metadata = json.loads((Path(kernel.__file__).parent / "metadata.json").read_text())
    return {key: metadata.get(key) for key in ("id", "version", "provenance")}


def ceilings(dtype: torch.dtype, device: str) -> dict | None:
    """Bytes a second of a copy (read plus written) and operations a second of a large product; None on a CPU."""
    if device != "cuda":
        return None
    source = torch.empty(2**30, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy = summary([time_calls([lambda: target.copy_(source)], 10, device)])["median"]
    size = 8192
    a, b, out = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(3))
    product = summary([time_calls([lambda: torch.mm(a, b, out=out)], 10, device)])["median"]
    return {
        "bytes_per_second": 2 * source.numel() / copy * 1e3,
        "operations_per_second": 2 * size**3 / product * 1e3,
    }
