"""Calls as a GPU's backend makes them, what they launch, and the memory they take meanwhile."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from .absent import LAYERS, E, Layer, module

KINDS = [*LAYERS, "4 bit with adapters, fast", "adapters as PEFT's", "adapters with dropout"]
MANY = 3000  # tokens, enough for tiles of 128 rows and for weights to be dequantized
MAKERS = ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty"))
BEFORE = 9  # of a launch's arguments: the grid, the stream, and what is Triton's


def make_layer(kernel, kind: str = "adapters", tokens: int = 24) -> Layer:
    layer = Layer(kernel, kind, tokens)
    if "PEFT" in kind:
        change_adapters(layer, lambda A, B, *rest: (A, torch.empty(*B.shape[1:], E).permute(2, 0, 1), *rest))
    if "dropout" in kind:
        change_adapters(layer, lambda A, B, scaling, _: (A, B, scaling, 0.1))
        layer.seed = torch.zeros(1, dtype=torch.int64)
    return layer


def change_adapters(layer: Layer, change: Callable) -> None:
    layer.projections = [p.of(p.weight, p.lora.__class__(*change(*p.lora))) for p in layer.projections]


def replayed_call(kernel, direction: str, arguments: tuple) -> tuple:
    function = getattr(module(kernel, "experts"), f"experts_{direction}")
    return module(kernel, "replay").replayed(function, *arguments)


def replayed_step(kernel, layer: Layer) -> None:
    _, *saved = replayed_call(kernel, "forward", layer.forward_arguments())
    replayed_call(kernel, "backward", layer.backward_arguments(tuple(saved)))


def share_at_most(kernel, monkeypatch, at_once: int = 0, small: int = 0) -> None:
    """Bytes of the allocation that a replay makes for others: for all, or for the smallest."""
    for name, size in (("AT_ONCE", at_once), ("SMALL", small)):
        monkeypatch.setattr(module(kernel, "record"), name, size)


def tensors_in(values: tuple) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, tuple):
            yield from tensors_in(value)
        elif isinstance(value, torch.Tensor):
            yield value


@contextmanager
def at_each_allocation(note: Callable[[torch.Tensor], None]) -> Iterator[None]:
    def noting(make: Callable) -> Callable:
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            note(tensor)
            return tensor

        return made

    with ExitStack() as patches:
        for owner, name in MAKERS:
            patches.enter_context(mock.patch.object(owner, name, noting(getattr(owner, name))))
        yield


@contextmanager
def allocations() -> Iterator[list[torch.Tensor]]:
    """All tensors that are made inside. They are kept, so each has an address of its own."""
    made = []
    with at_each_allocation(made.append):
        yield made


def trace_of(kernel, compiler, direction: str, arguments: tuple) -> tuple[list, tuple]:
    """What a call launches and returns, with addresses named by whose they are; and its results. Its kernels have been
    compiled."""
    first = len(compiler.launched)
    with allocations() as made, mock.patch.multiple(module(kernel, "record"), AT_ONCE=0, SMALL=0):
        results = replayed_call(kernel, direction, arguments)
    given = [*tensors_in(arguments)]
    names = {tensor.data_ptr(): f"argument {i}" for i, tensor in enumerate(given)}

    def named(value):
        if isinstance(value, tuple):
            return tuple(map(named, value))
        if isinstance(value, TensorDescriptor):
            fields = vars(value).items()
            return tuple((name, named(x.data_ptr()) if name == "base" else x) for name, x in fields)
        address = value.data_ptr() if isinstance(value, torch.Tensor) else value
        for tensor in (*given, *made):
            if isinstance(address, int) and holds(tensor, address):
                start = tensor.data_ptr()
                return names.setdefault(start, f"memory {len(names)}"), address - start
        return names.get(address, address)

    launches = zip(compiler.launched[first:], compiler.arguments[first:])
    trace = [(name, named(arguments[:3] + arguments[BEFORE:])) for name, arguments in launches]
    trace += [x if x is None else (named(x), x.shape, x.stride(), x.dtype) for x in results]
    return [*trace, type(results)], results


def values_of(arguments: Iterable) -> Iterator:
    """What launches were given, tuples and descriptors taken apart."""
    for value in arguments:
        if isinstance(value, TensorDescriptor):
            yield from (value.base.data_ptr(), value.shape, value.strides, value.block_shape)
        elif isinstance(value, tuple):
            yield from values_of(value)
        else:
            yield value


def holds(tensor: torch.Tensor, address: int) -> bool:
    return 0 <= address - tensor.data_ptr() < tensor.nbytes


@contextmanager
def bytes_in_use() -> Iterator[list[int]]:
    """The bytes that are allocated inside, after each allocation."""
    held, found = {}, []

    def note(tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        held[id(storage)] = -(-storage.nbytes() // 512) * 512  # as on a GPU
        weakref.finalize(storage, held.pop, id(storage))
        found.append(sum(held.values()))

    with at_each_allocation(note):
        yield found
