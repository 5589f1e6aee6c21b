"""Triton's interpreter with less to do: most of its time goes into what it works out anew for every operation.

What it computes stays the same, as ``tests/kernel/interpreted/test_hastened.py`` sees. All of this is the inside of one
version of Triton, and any other is left as it is.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import triton
from triton.language import core, semantic
from triton.runtime import interpreter

VERSION = "3.6."

_originals: list[tuple[Any, str, Any]] = []


def hasten() -> None:
    """From now on, in this process."""
    if triton.__version__.startswith(VERSION) and not _originals:
        _patch_the_language_once_a_launch()
        _leave_out_checks_whose_results_nobody_reads()
        _share_shapes()
        _look_dtypes_up()


def slow_down() -> None:
    """As it was before ``hasten``."""
    while _originals:
        setattr(*_originals.pop())


def _replace(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """``owner.name`` becomes what ``make`` makes of it."""
    original = getattr(owner, name)
    _originals.append((owner, name, original))
    setattr(owner, name, make(original))


def _patch_the_language_once_a_launch() -> None:
    """A launch puts the interpreter's functions in the place of the language's, and undoes that at its end. Each call
    of a device function does so once more, hundreds of attributes for what may be one sum."""
    nothing_to_undo, patched = interpreter._LangPatchScope(), []

    def make(patch: Callable) -> Callable:
        def patch_lang(fn):
            languages = {core for value in fn.__globals__.values() if value is core}
            languages |= {triton.language for value in fn.__globals__.values() if value is triton.language}
            if patched and languages <= patched[-1]:
                return nothing_to_undo
            scope = patch(fn)
            if patched:  # a device function that sees more of the language
                patched[-1] |= languages
            else:
                patched.append(languages)
                undo = scope.restore
                scope.restore = lambda: (undo(), patched.clear())
            return scope

        return patch_lang

    _replace(interpreter, "_patch_lang", make)


def _leave_out_checks_whose_results_nobody_reads() -> None:
    """Integers are added a second time in 64 bits, to see whether they overflow in 32. Where that is asserted, nothing
    happens unless the interpreter runs with ``debug``."""

    def make(options: Any) -> Any:
        return dataclasses.replace(options, sanitize_overflow=options.debug)

    _replace(interpreter.interpreter_builder, "options", make)


def _share_shapes() -> None:
    """A shape is checked, counted and wrapped once, not once a tensor; and shapes that are one object are equal, which
    leaves nothing to broadcast."""
    of_types, of_tensors = {}, {}

    def of_type(init: Callable) -> Callable:
        def block_type_init(self, element_ty, shape):
            sizes = tuple(core._unwrap_if_constexpr(size) for size in shape)
            if sizes not in of_types:
                init(self, element_ty, shape)
                of_types[sizes] = self.shape, self.numel
            self.element_ty, (self.shape, self.numel) = element_ty, of_types[sizes]
            self.name = f"<{self.shape}, {element_ty}>"

        return block_type_init

    def of_tensor(init: Callable) -> Callable:
        def tensor_init(self, handle, type):
            shape = type.shape if type.is_block() else ()
            if id(shape) not in of_tensors:
                init(self, handle, type)
                of_tensors[id(shape)] = self.shape, self.numel, shape  # which stays, or another could have its id
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel, _ = of_tensors[id(shape)]

        return tensor_init

    def unless_equal(broadcast: Callable) -> Callable:
        return lambda self, lhs, rhs: (lhs, rhs) if lhs.shape is rhs.shape else broadcast(self, lhs, rhs)

    _replace(core.block_type, "__init__", of_type)
    _replace(core.tensor, "__init__", of_tensor)
    _replace(semantic.TritonSemantic, "broadcast_impl_value", unless_equal)


def _look_dtypes_up() -> None:
    """NumPy's dtype for one of Triton's comes from a table that is written down for each question."""

    def make(original: Callable) -> Callable:
        found = {}

        def np_dtype(dtype):
            name = dtype.scalar.name
            if name not in found:
                found[name] = original(dtype)
            return found[name]

        return np_dtype

    _replace(interpreter, "_get_np_dtype", make)
