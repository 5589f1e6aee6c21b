"""Input checks: every error names the argument, what it got and what it wants, before anything is launched.

Only shapes, dtypes and devices are looked at. Values live on the device; reading them would make the host wait.
"""

import torch

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
KERNEL_FLOATS = FLOATS[:3]
INTEGERS = (torch.int32, torch.int64)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def check_dims(name: str, tensor: torch.Tensor, dims: str) -> None:
    """``dims`` is written as in the docstrings, for example ``"(T, H)"``."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor of shape {dims}, got {type(tensor).__name__}")
    if tensor.dim() != dims.count(",") + 1 - dims.count(",)"):
        raise ValueError(f"{name} must have shape {dims}, got {tuple(tensor.shape)}")


def check_size(name: str, tensor: torch.Tensor, dim: int, want: int, because: str) -> None:
    if tensor.shape[dim] != want:
        raise ValueError(
            f"{name} must have size {want} in dimension {dim} ({because}), got shape {tuple(tensor.shape)}"
        )


def check_float(name: str, tensor: torch.Tensor) -> None:
    wanted = KERNEL_FLOATS if tensor.is_cuda else FLOATS
    if tensor.dtype not in wanted:
        raise TypeError(f"{name} must be one of {_names(wanted)} on {tensor.device.type}, got {tensor.dtype}")


def check_integer(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in INTEGERS:
        raise TypeError(f"{name} must be one of {_names(INTEGERS)}, got {tensor.dtype}")


def check_count(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_like(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor, dtype: bool = True) -> None:
    """``tensor`` must be on the device of ``other`` and, with ``dtype``, have its dtype."""
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on {other.device} like {other_name}, got {tensor.device}")
    if dtype and tensor.dtype != other.dtype:
        raise TypeError(f"{name} must be {other.dtype} like {other_name}, got {tensor.dtype}")


def check_device(name: str, tensor: torch.Tensor) -> None:
    if tensor.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"{name} must be on a cpu or cuda device, got {tensor.device}")


def check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def _names(dtypes) -> str:
    return ", ".join(str(dtype) for dtype in dtypes)
