"""Puts the qwen3-moe-fused kernel into Transformers models; knows Transformers and ``kernels``, and no Triton."""

from .kernelize import kernelize_model, register
from .source import KernelSource

__all__ = ["KernelSource", "kernelize_model", "register"]
