"""Fixtures every test shares: the kernel as a user gets it (built, then loaded by ``kernels``), devices and dtypes."""

import gc
import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
ALONE = "test_qwen3_moe_fused.py"
"""It loads the kernel from where LOCAL_KERNELS says; ``test_kernels_ci.py`` runs it. kernel-builder's CI has tests/ and
torch-ext/ of this repository, and of all packages torch, kernels and pytest: there it is all that can run."""

if os.environ.get("TRITON_INTERPRET") == "1":  # else Triton need not be there
    from tests import interpreter

    interpreter.hasten()

collect_ignore = [] if "LOCAL_KERNELS" in os.environ else [ALONE]
if not (ROOT / "scripts").is_dir():
    collect_ignore += [path.name for path in Path(__file__).parent.iterdir() if path.name != ALONE]


def pytest_addoption(parser):
    parser.addoption("--kernel-dir", type=Path, help="folder that holds build/ (default: the tests build their own)")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name != "test_interpreted.py")  # the longest, beside which all others run
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # keywords are names of folders, too
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def freed(request):
    """Leaves the GPU to other processes: what a test has freed, PyTorch would keep for this one."""
    yield
    if "gpu" in request.node.keywords:
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def kernel_dir(request, tmp_path_factory) -> Path:
    """A folder with ``build/``, built from this tree: what ``LOCAL_KERNELS`` and ``get_local_kernel`` take."""
    given = request.config.getoption("--kernel-dir")
    if given:
        return given.resolve()
    import build_kernel

    folder = tmp_path_factory.mktemp("kernel")
    build_kernel.build(ROOT, folder / "build")
    return folder


@pytest.fixture(scope="session")
def kernel(kernel_dir):
    """The built kernel's module, for the device this machine has."""
    from kernels import get_local_kernel

    return get_local_kernel(kernel_dir)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    return request.param


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def dtype(request) -> torch.dtype:
    return request.param
