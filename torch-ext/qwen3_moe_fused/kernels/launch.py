"""Launching kernels without paying for what does not change.

``kernel[grid](...)`` binds, inspects and hashes every argument and reads a dozen settings on each call: more host
time than a small kernel takes on the device. Here the first call goes that way and returns the compiled kernel; later
calls with the same key launch that one directly. The key holds all that Triton specialises on, and the tests check
that it does. Kernels that are missing are compiled together with others, see ``first_call``.
"""

import threading
from typing import Any, Dict, List, Tuple

import torch
import triton
from triton.runtime import driver

from . import first_call

Tensor = torch.Tensor

_compiled: Dict[Tuple, Any] = {}


class _Thread(threading.local):
    recording = None  # notes this thread's launches, see ``record``


thread = _Thread()


def launch(
    kernel: triton.JITFunction,
    grid: Tuple[int, ...],
    num_warps: int,
    num_stages: int,
    pointers: Tuple,
    counts: Tuple[int, ...],
    *constants: Any,
    fp_fusion: bool = True,
) -> None:
    """Launches ``kernel`` on the current device. Its parameters are, in this order:

    pointers: tensors, each on that device, None, descriptors, or tuples of these and of strides.
    counts: the integers that the kernel marks ``do_not_specialize``, which may change from call to call.
    constants: all the others. Another value makes a new entry, as it would make Triton look for another compilation.

    ``fp_fusion`` says whether a product and a sum may be rounded as one, and is the same in all calls of a kernel.
    """
    grid = (*grid, 1, 1)[:3]
    if not isinstance(kernel, triton.JITFunction):  # Triton's interpreter compiles nothing
        kernel[grid](*pointers, *counts, *constants)
        if thread.recording is not None:
            thread.recording.launched(None, grid, ())
        return
    addresses, traits = specialize(pointers, counts, constants)
    device = torch.cuda.current_device()
    key = (kernel.__name__, num_warps, num_stages, device, *traits)
    compiled = _compiled.get(key)
    if compiled is None or first_call.rehearsing:
        arguments = (*pointers, *counts, *constants)
        options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": fp_fusion}
        if not first_call.intercepts(kernel, grid, arguments, options, compiled is not None):
            _compiled[key] = kernel[grid](*arguments, **options)
    else:
        # ``compiled[grid](...)`` without its 2 us for launch hooks, which Triton's profiler alone sets. Given tensors,
        # it would ask each for its address once more, and the driver about the address.
        stream = driver.active.get_current_stream(device)
        compiled.run(
            *grid, stream, compiled.function, compiled.packed_metadata, None, None, None,
            *addresses, *counts, *constants,
        )  # fmt: skip
    if thread.recording is not None:
        thread.recording.launched(compiled, grid, (*pointers, *counts, *constants))


def specialize(pointers: Tuple, counts: Tuple[int, ...], constants: Tuple) -> Tuple[List, Tuple]:
    """The addresses to launch with in the place of tensors, and all that decides which compiled kernel fits."""
    addresses, traits = _resolve(pointers)
    return addresses, (*traits, *[count.bit_length() < 32 for count in counts], *constants)


def _resolve(pointers: Tuple) -> Tuple[List, List]:
    addresses, traits = [], []
    for pointer in pointers:
        address = trait = pointer
        if isinstance(pointer, Tensor):
            address = pointer.data_ptr()
            trait = pointer.dtype, address % 16 == 0
        elif pointer is None or isinstance(pointer, int):
            pass
        elif isinstance(pointer, tuple):
            address, trait = map(tuple, _resolve(pointer))
        else:
            trait = pointer.base.dtype, *pointer.block_shape
        addresses.append(address)
        traits.append(trait)
    return addresses, traits
