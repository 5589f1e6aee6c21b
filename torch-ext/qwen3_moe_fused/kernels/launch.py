"""Launching kernels without paying for what does not change.

``kernel[grid](...)`` binds, inspects and hashes every argument and reads a dozen settings on each call: more host
time than a small kernel takes on the device. Here the first call goes that way and returns the compiled kernel; later
calls with the same key launch that one directly. The key holds all that Triton specialises on, and the tests check
that it does.
"""

import functools
from typing import Any, Dict, List, Tuple

import torch
import triton

_compiled: Dict[Tuple, Any] = {}
_CONSTANTS = (int, bool, float, str, type(None))


def launch(
    kernel: triton.JITFunction,
    grid: Tuple[int, ...],
    num_warps: int,
    num_stages: int,
    *args: Any,
    fp_fusion: bool = True,
) -> None:
    """Launches ``kernel`` on the current device; ``args`` are all its parameters in order, constants too.

    Integers that the kernel marks ``do_not_specialize`` may change from call to call; any other change of an integer
    makes a new entry, as it would make Triton look for another compilation. ``fp_fusion`` says whether a product and
    a sum may be rounded as one, and is the same in all calls of a kernel.
    """
    grid = (*grid, 1, 1)[:3]
    if not isinstance(kernel, triton.JITFunction):  # Triton's interpreter compiles nothing
        kernel[grid](*args)
        return
    key = (kernel.__name__, num_warps, num_stages, torch.cuda.current_device(), *_traits(kernel, args))
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=fp_fusion)
    else:
        compiled[grid](*args)


def _traits(kernel: triton.JITFunction, args: Tuple) -> List:
    """What of each argument decides which compiled kernel fits."""
    traits = [arg if type(arg) in _CONSTANTS else _trait(arg) for arg in args]
    for i in _free(kernel):
        traits[i] = args[i].bit_length() < 32
    return traits


def _trait(arg: Any) -> Tuple:
    if isinstance(arg, torch.Tensor):
        return arg.dtype, arg.data_ptr() % 16 == 0
    if isinstance(arg, tuple):
        return tuple([part if type(part) in _CONSTANTS else _trait(part) for part in arg])
    return arg.base.dtype, *arg.block_shape


@functools.cache
def _free(kernel: triton.JITFunction) -> Tuple[int, ...]:
    """Positions of the integers whose value the kernel is not compiled for."""
    return tuple(i for i, param in enumerate(kernel.params) if not param.is_constexpr and param.do_not_specialize)
