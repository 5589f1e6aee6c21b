"""The launcher's key: two calls that Triton would compile differently never share a compiled kernel."""

import importlib
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher
from triton.compiler import make_backend
from triton.runtime import _allocation
from triton.runtime.jit import create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit(do_not_specialize=["count"])
def _kernel(x, maybe, count, stride, NAME: tl.constexpr, SIZE: tl.constexpr):
    pass


TRITONS_OWN = create_function_from_signature(_kernel.signature, _kernel.params, make_backend(GPUTarget("cuda", 90, 32)))

COUNTS = st.sampled_from([0, 1, 2, 16, 17, 2**31 - 1, 2**31, 2**40])
INTEGERS = COUNTS | st.just(-1)
TENSORS = st.builds(
    lambda dtype, start: torch.zeros(64, dtype=dtype)[start:],
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64]),
    st.sampled_from([0, 1, 16]),
)
DESCRIPTORS = st.builds(
    lambda dtype, block: TensorDescriptor(torch.zeros(64, 64, dtype=dtype), [64, 64], [64, 1], block),
    st.sampled_from([torch.bfloat16, torch.float16]),
    st.sampled_from([[16, 64], [64, 16], [64, 64]]),
)
TUPLES = st.tuples(TENSORS, st.none() | TENSORS)
ARGUMENTS = st.tuples(
    TENSORS,
    st.one_of(st.none(), TENSORS, DESCRIPTORS, TUPLES),
    COUNTS,
    INTEGERS,
    st.sampled_from(["silu", "gelu"]),
    st.sampled_from([16, 32]),
)


class _Compiled(SimpleNamespace):
    function, packed_metadata = 7, (1, 2)


@pytest.mark.skipif(not triton.__version__.startswith("3.6."), reason="the way around is Triton 3.6's alone")
@pytest.mark.parametrize("scratch", [0, 128])
def test_a_launcher_gives_the_driver_what_triton_would(kernel, scratch, monkeypatch):
    launch, given = importlib.import_module(f"{kernel.__name__}.kernels.launch"), []
    run = object.__new__(CudaLauncher)
    run.launch = lambda *arguments: given.append(arguments)
    run.launch_cooperative_grid, run.launch_pdl, run.num_ctas = False, True, 1
    run.global_scratch_size, run.global_scratch_align = scratch, 16
    run.profile_scratch_size, run.profile_scratch_align = 0, 1
    monkeypatch.setattr(_allocation, "_allocator", SimpleNamespace(get=lambda: lambda *size: f"{size[0]} bytes"))
    compiled = _Compiled(run=run)
    launcher = launch.Launcher.of(compiled)
    launcher.function(4, 2, 1, 99, *launcher.between, 0x100, 16, "silu")
    compiled.run(4, 2, 1, 99, compiled.function, compiled.packed_metadata, None, None, None, 0x100, 16, "silu")
    assert given[0] == given[1] and (launcher.function == run.launch) == (scratch == 0)
    assert f"{8 * scratch} bytes" in given[0] or not scratch
    assert launcher.kernel is compiled, "or Triton may unload its code"


@pytest.fixture(scope="module")
def specialize(kernel):
    return importlib.import_module(f"{kernel.__name__}.kernels.launch").specialize


@settings(max_examples=400)
@given(ARGUMENTS, ARGUMENTS, st.integers(0, 5))
def test_calls_that_triton_tells_apart_have_different_keys(specialize, first, second, position):
    """Of two calls that differ in one argument, or in all."""
    one_changed = (*first[:position], second[position], *first[position + 1 :])
    for other in (one_changed, second):
        if _specialization(first) != _specialization(other):
            assert _key(specialize, first) != _key(specialize, other)


def test_a_new_number_of_tokens_is_the_same_key(specialize):
    x = torch.zeros(64)
    keys = {_key(specialize, (x, None, count, 64, "silu", 16)) for count in (1, 16, 17, 4096, 2**31 - 1)}
    assert len(keys) == 1


def test_every_tensor_is_launched_by_its_address(specialize):
    x, inner = torch.zeros(64), torch.zeros(64)[1:]
    addresses, _ = specialize((x, None, (inner, 5, None)), (3,), ())
    assert addresses == [x.data_ptr(), None, (inner.data_ptr(), 5, None)]


def _specialization(arguments: tuple) -> list:
    return TRITONS_OWN(*arguments)[1]


def _key(specialize, arguments: tuple) -> tuple:
    return specialize(*_by_kind(arguments))[1]


def _by_kind(arguments: tuple) -> tuple:
    """Pointers, counts and constants of ``_kernel``."""
    x, maybe, count, *constants = arguments
    return (x, maybe), (count,), tuple(constants)
