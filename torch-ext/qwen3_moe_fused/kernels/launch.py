"""Launching kernels without paying for what does not change.

``kernel[grid](...)`` binds, inspects and hashes every argument and reads a dozen settings on each call: more host
time than a small kernel takes on the device. Here the first call goes that way and returns the compiled kernel; later
calls with the same key launch that one directly. The key holds all that Triton specialises on, and the tests check
that it does. Kernels that are missing are compiled together with others, see ``first_call``.
"""

import threading
from typing import Any, Callable, Dict, List, NamedTuple, Tuple

import torch
import triton
from triton.runtime import driver

from . import first_call

Tensor = torch.Tensor


class Launcher(NamedTuple):
    """What launches a compiled kernel: a function of the grid, the stream, ``between`` and the kernel's arguments.

    It holds ``kernel``, too: some versions of Triton unload the code of one that nobody holds any more.
    """

    function: Callable
    between: Tuple
    kernel: Any

    @staticmethod
    def of(compiled: Any) -> "Launcher":
        """Given tensors, either function would ask each for its address once more, and the driver about the address.

        ``compiled[grid](...)`` would look for launch hooks on top, which Triton's profiler alone sets: 2 us. And what
        Triton 3.6 calls is Python around a function in C. It allocates scratch memory, of which these kernels need
        none, and passes all else on: 1 us more.
        """
        run, rest = compiled.run, (compiled.packed_metadata, None, None, None)
        if _RUN_PASSES_ON and not getattr(run, "global_scratch_size", 1) and not run.profile_scratch_size:
            between = compiled.function, run.launch_cooperative_grid, run.launch_pdl, None, None, *rest
            return Launcher(run.launch, between, compiled)
        return Launcher(run, (compiled.function, *rest), compiled)


_RUN_PASSES_ON = triton.__version__.startswith("3.6.")
_launchers: Dict[Tuple, Launcher] = {}


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
    launcher = _launchers.get(key)
    if launcher is None or first_call.rehearsing:
        arguments = (*pointers, *counts, *constants)
        options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": fp_fusion}
        if not first_call.intercepts(kernel, grid, arguments, options, launcher is not None):
            # Of two threads' kernels, the first stays: records may have its code.
            _launchers.setdefault(key, Launcher.of(kernel[grid](*arguments, **options)))
    else:
        stream = driver.active.get_current_stream(device)
        launcher.function(*grid, stream, *launcher.between, *addresses, *counts, *constants)
    if thread.recording is not None:
        thread.recording.launched(launcher, grid, (*pointers, *counts, *constants))


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
