"""Records: what can be replayed and what cannot, and the memory that a replay takes."""

import importlib
import weakref
from collections import deque

import pytest
import torch

from .absent import E, module
from .replays import (
    BEFORE,
    KINDS,
    MANY,
    allocations,
    at_each_allocation,
    bytes_in_use,
    holds,
    make_layer,
    replayed_call,
    replayed_step,
    share_at_most,
    tensors_in,
    values_of,
)


def _whole(launch, x):
    launch(x, out := torch.empty_like(x))
    return (out,)


def _inside_of_memory(launch, x):
    launch(torch.empty_like(x)[:, 4:], out := torch.empty_like(x))
    return (out,)


def _inside_of_an_argument(launch, x):
    launch(x[:, 4:], out := torch.empty_like(x))
    return (out,)


def _nothing_of_memory(launch, x):
    launch(torch.empty_like(x)[:0], out := torch.empty_like(x))
    return (out,)


def _nothing_of_an_argument(launch, x):
    launch(x[:0], out := torch.empty_like(x))
    return (out,)


def _inside_of_what_two_share(launch, x, y):
    """In another call, the other may lie elsewhere."""
    launch(y[:, 4:], out := torch.empty_like(x))
    return (out,)


def _written_by_pytorch(launch, x):
    launch(x, out := torch.empty_like(x).zero_())
    return (out,)


def _made_by_pytorch(launch, x):
    launch(x + 1, out := torch.empty_like(x))
    return (out,)


def _empty(launch, x):
    launch(x, torch.empty(0))
    return (torch.empty_like(x),)


def _elsewhere(launch, x):
    launch(x, x)
    return (torch.empty_like(x, device="meta"),)


def _part(launch, x):
    launch(x, out := torch.empty_like(x))
    return (out[:4],)


def _other_shape(launch, x):
    launch(x, out := torch.empty_like(x))
    return (out.view(-1),)


def _other_dtype(launch, x):
    launch(x, out := torch.empty_like(x))
    return (out.view(torch.int32),)


def _other_strides(launch, x):
    launch(x, out := torch.empty_like(x))
    return (out.transpose(0, 1),)


def _view_of_an_argument(launch, x):
    launch(x, x)
    return (x.view(-1),)


def _no_launch(launch, x):
    return (torch.empty_like(x),)


CAN = [_whole, _inside_of_memory, _inside_of_an_argument, _nothing_of_memory, _nothing_of_an_argument]
CANNOT = [_inside_of_what_two_share, _written_by_pytorch, _made_by_pytorch, _empty, _elsewhere, _part, _other_shape]
CANNOT += [_other_dtype, _other_strides, _view_of_an_argument, _no_launch]


@pytest.mark.parametrize("function", CAN + CANNOT)
def test_what_can_be_replayed_and_what_cannot(kernel, compiler, replays, function):
    launcher, kernels = module(kernel, "launch"), module(kernel, "combine")

    def launch(x: torch.Tensor, out: torch.Tensor) -> None:
        launcher.launch(kernels._combine_kernel, (1,), 4, 1, (x, x, x, out), (), 8, 1, E, *[1] * 5)

    for _ in range(5):
        x = torch.empty(16, 8)
        tensors = (x[:8], x[8:]) if function is _inside_of_what_two_share else (torch.empty(8, 8),)
        (result,) = module(kernel, "replay").replayed(function, launch, *tensors)
        (expected,) = function(launch, *tensors)
        assert [f(result) for f in (torch.Tensor.size, torch.Tensor.stride)] == [
            f(expected) for f in (torch.Tensor.size, torch.Tensor.stride)
        ]
        assert (result.dtype, result.device) == (expected.dtype, expected.device)
    assert replays == ([True] * 3 if function in CAN else [])


@pytest.mark.parametrize("function", [_nothing_of_memory, _nothing_of_an_argument])
def test_the_address_of_nothing_is_none_in_every_call(kernel, compiler, replays, function):
    """Memory lies elsewhere each time: a difference of addresses would be another one, or negative."""
    launcher, kernels, kept = module(kernel, "launch"), module(kernel, "combine"), []

    def launch(x: torch.Tensor, out: torch.Tensor) -> None:
        launcher.launch(kernels._combine_kernel, (1,), 4, 1, (x, x, x, out), (), 8, 1, E, *[1] * 5)

    for _ in range(5):
        x = torch.empty(8, 8)
        kept += [x, *module(kernel, "replay").replayed(function, launch, x)]
    assert len(replays) == 3
    for arguments in compiler.arguments[-3:]:
        assert arguments.count(0) >= 3 and min(x for x in arguments if isinstance(x, int)) >= 0


def test_a_tuple_of_one_stays_a_tuple(kernel, compiler, replays):
    launcher = module(kernel, "launch")

    def function(x):
        launcher.launch(module(kernel, "combine")._combine_kernel, (1,), 4, 1, ((x,), x, x, x), (), 8, 1, E, *[1] * 5)
        return (x,)

    for _ in range(4):
        module(kernel, "replay").replayed(function, torch.empty(8))
    assert all(isinstance(arguments[BEFORE], tuple) for arguments in compiler.arguments[1:])


def test_an_address_belongs_to_whom_memory_is_and_not_to_whom_it_was(kernel, compiler):
    x = torch.empty(8)
    with module(kernel, "record").Recording([x]) as recording:
        freed, memory = torch.empty(8), torch.empty(1024)
    place = recording.memory[memory.data_ptr()]
    recording.memory[memory[100:].data_ptr()] = recording.memory[freed.data_ptr()]  # it was there
    assert recording._whose(memory[100:]) == (place, 400) and recording._whose(x) == (0, 0)


@pytest.mark.parametrize("tokens", [24, MANY])
@pytest.mark.parametrize("kind", ["adapters", "4 bit"])
def test_nothing_is_kept_but_results(kernel, compiler, replays, kind, tokens, request):
    if tokens == MANY:
        request.getfixturevalue("many")
    for _ in range(3):
        arguments = make_layer(kernel, kind, tokens).forward_arguments()
        with allocations() as made:
            results = replayed_call(kernel, "forward", arguments)
        left = [*map(weakref.ref, made), *map(weakref.ref, tensors_in(arguments))]
        made.clear()
        compiler.arguments.clear()
        del arguments
        assert {id(ref()) for ref in left if ref() is not None} == {id(x) for x in tensors_in(results)}
    assert replays == [True]


@pytest.mark.parametrize("tokens, at_once, small", [(24, 2**23, 0), (24, 0, 2**13), (MANY, 2**23, 0), (MANY, 0, 2**20)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", ["inference", "forward", "backward"])
def test_what_ends_with_a_call_shares_an_allocation(
    kernel, compiler, replays, call, kind, tokens, at_once, small, request, monkeypatch
):
    share_at_most(kernel, monkeypatch, at_once, small)
    if tokens == MANY:
        request.getfixturevalue("many")
    layer = make_layer(kernel, kind, tokens)
    arguments = layer.forward_arguments(save=call != "inference")
    if call == "backward":
        arguments = layer.backward_arguments(tuple(layer.forward()[1:]))
    runs = []
    for _ in range(4):  # compiled, by the code, by the code as it is recorded, replayed
        compiler.arguments.clear()
        with allocations() as made:
            results = replayed_call(kernel, "backward" if call == "backward" else "forward", arguments)
        values = [*values_of(value for launch in compiler.arguments for value in launch[:3] + launch[BEFORE:])]
        runs.append((values, made))
        if len(runs) == 1:
            importlib.import_module(f"{kernel.__name__}.form").forget()
    _, (values, made), _, (others, others_made) = runs
    assert replays == [True]

    moved = [set() for _ in made]  # where in the replay lies what the code has allocated
    for value, other in zip(values, others, strict=True):
        owners = [i for i, x in enumerate(made) if isinstance(value, int) and holds(x, value)]
        for i in owners:
            moved[i].add(other + made[i].data_ptr() - value)
        assert owners or value == other
    assert all(len(starts) < 2 for starts in moved), "each in one place"
    spans = sorted((start, start + x.nbytes) for x, starts in zip(made, moved) for start in starts)
    assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:])), "none on another"
    assert all(any(holds(x, start) and holds(x, end - 1) for x in others_made) for start, end in spans)

    returned = {x.data_ptr() for x in tensors_in(results)}
    (whole,) = [x for x in others_made if x.dtype == torch.uint8 and x.data_ptr() not in returned]
    inside = [(start, end) for start, end in spans if holds(whole, start)]
    assert all((start - whole.data_ptr()) % 512 == 0 for start, _ in inside), "as PyTorch's allocations are"
    assert whole.nbytes == sum(-(-(end - start) // 512) * 512 for start, end in inside) <= max(at_once, small)
    apart = [x.nbytes for x in others_made if x is not whole and x.data_ptr() not in returned]
    assert not apart if at_once else max(end - start for start, end in inside) <= min(apart)


@pytest.mark.parametrize("tokens", [24, MANY])
@pytest.mark.parametrize("kind", KINDS)
def test_no_more_memory_at_any_time(kernel, compiler, replays, kind, tokens, request, monkeypatch):
    compiler.arguments = deque(maxlen=0)  # keeps none alive
    if tokens == MANY:
        request.getfixturevalue("many")

    share_at_most(kernel, monkeypatch)  # that much more, see above

    def peaks() -> list[int]:
        layer = make_layer(kernel, kind, tokens)
        with bytes_in_use() as forward:
            _, *saved = replayed_call(kernel, "forward", layer.forward_arguments())
        arguments = layer.backward_arguments(tuple(saved))
        with bytes_in_use() as backward:
            replayed_call(kernel, "backward", arguments)
        return [max(forward), max(backward)]

    make_layer(kernel, kind, tokens).step()
    by_code, recorded, replayed = [peaks() for _ in range(3)]
    assert recorded == by_code and all(a <= b for a, b in zip(replayed, by_code)) and replays == [True, True]


@pytest.mark.parametrize("tokens", [24, MANY])
@pytest.mark.parametrize("kind", KINDS)
def test_launches_are_given_memory_that_is_there(kernel, compiler, replays, kind, tokens, request, monkeypatch):
    share_at_most(kernel, monkeypatch, small=2**13)
    if tokens == MANY:
        request.getfixturevalue("many")
    living, addresses = {}, set()

    def note(tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        living[id(storage)] = tensor.data_ptr(), tensor.data_ptr() + storage.nbytes()
        weakref.finalize(storage, living.pop, id(storage))
        addresses.add(tensor.data_ptr())

    class Launches(list):
        def append(self, arguments: tuple) -> None:
            given = {x for x in values_of(arguments[BEFORE:]) if isinstance(x, int)} & addresses
            assert all(any(start <= x < end for start, end in living.values()) for x in given)

    for step in range(4):
        layer = make_layer(kernel, kind, tokens)
        addresses.clear()  # where this layer lies, others have lain
        if step == 3:
            compiler.arguments = Launches()
        with at_each_allocation(note):
            replayed_step(kernel, layer)
    assert replays == [True] * 4
