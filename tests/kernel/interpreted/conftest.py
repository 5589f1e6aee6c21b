"""The Triton kernels on a CPU, in Triton's interpreter: here the package's CPU backend is its Triton launchers.

Triton decides once, as it is imported, whether kernels are compiled or interpreted, and torch.compile imports it
too. So these tests want a process of their own, which ``test_interpreted.py`` starts; to run some of them alone:

    TRITON_INTERPRET=1 pytest tests/kernel/interpreted -k linear

The interpreter multiplies bf16 wrongly, without a word: its tests use fp16 and fp32.
"""

import importlib
import os
from types import ModuleType, SimpleNamespace

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def launchers(kernel) -> SimpleNamespace:
    """The Triton launchers by name, and the types they take."""
    files = {"routing": ("routing", "tile_table"), "linear": ("linear",), "weight_grad": ("weight_grad",)}
    files |= {"dequantize": ("dequantize", "dequantize_experts"), "four_bit_fast": ("fast_weights", "permuted")}
    files |= {"combine": ("combine", "combine_backward"), "experts": ("experts_forward", "experts_backward")}
    modules = {file: importlib.import_module(f"{kernel.__name__}.kernels.{file}") for file in files}
    others = {"projection": ("Gradients", "Lora", "Projection"), "four_bit": ("four_bit_weight",)}
    others |= {"routed": ("order_of",)}
    modules |= {file: importlib.import_module(f"{kernel.__name__}.{file}") for file in others}
    files |= others
    return SimpleNamespace(**{name: getattr(modules[file], name) for file, names in files.items() for name in names})


@pytest.fixture(scope="session")
def triton_kernel(kernel, launchers) -> ModuleType:
    """The kernel, with each op's CPU backend replaced by its Triton launcher."""
    ops = {
        "routing": {"_routing": launchers.routing},
        "linear": {"_linear": launchers.linear, "_weight_grad": launchers.weight_grad},
    }
    for file, launcher_of in ops.items():
        for name, launcher in launcher_of.items():
            getattr(importlib.import_module(f"{kernel.__name__}.{file}"), name).register_kernel("cpu")(launcher)
    backends = importlib.import_module(f"{kernel.__name__}.backends")
    backends.FORWARD["cpu"] = launchers.experts_forward
    backends.BACKWARD["cpu"] = launchers.experts_backward
    backends.DEQUANTIZE["cpu"] = launchers.dequantize
    return kernel


@pytest.fixture(params=[torch.float32, torch.float16], ids=["fp32", "fp16"])
def dtype(request) -> torch.dtype:
    return request.param
