"""Replayed calls: they launch what the code would, and all that the code decides by makes a call of another form."""

import importlib
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from .absent import BF16, LAYERS, E, H, I, K, Layer, module

KINDS = [*LAYERS, "4 bit with adapters, fast", "adapters as PEFT's", "adapters with dropout"]
MANY = 3000  # tokens, enough for tiles of 128 rows and for weights to be dequantized
MAKERS = ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty"))
BEFORE = 9  # of a launch's arguments: the grid, the stream, and what is Triton's


@pytest.fixture
def replays(kernel, compiler, monkeypatch) -> list[bool]:
    """Of each call for which there is a record, whether it was replayed."""
    record, found = module(kernel, "record").Record, []
    replay = record.replay

    def noted(self, tensors):
        results = replay(self, tensors)
        found.append(results is not None)
        return results

    monkeypatch.setattr(record, "replay", noted)
    return found


@pytest.fixture
def fast(kernel, monkeypatch) -> None:
    """The card decodes 4-bit weights in registers."""
    regime = importlib.import_module(f"{kernel.__name__}.regime")
    monkeypatch.setattr(regime, "has_byte_permute", lambda device: True)
    monkeypatch.setattr(regime, "_fits_fast", lambda weight: True)


@pytest.fixture
def many(kernel, monkeypatch) -> None:
    """A card that reads weights by descriptors, a second product in halves, and weights decoded in several parts."""
    regime = importlib.import_module(f"{kernel.__name__}.regime")
    monkeypatch.setattr(module(kernel, "product"), "_has_tma", lambda device: True)
    monkeypatch.setattr(module(kernel, "experts"), "window", lambda slots, columns, *rest: columns // 2)
    monkeypatch.setattr(regime, "LARGE_SCRATCH", 0)
    monkeypatch.setattr(regime, "SCRATCH", 0)


def _layer(kernel, kind: str = "adapters", tokens: int = 24) -> Layer:
    layer = Layer(kernel, kind, tokens)
    if "PEFT" in kind:
        _change_adapters(layer, lambda A, B, *rest: (A, torch.empty(*B.shape[1:], E).permute(2, 0, 1), *rest))
    if "dropout" in kind:
        _change_adapters(layer, lambda A, B, scaling, _: (A, B, scaling, 0.1))
        layer.seed = torch.zeros(1, dtype=torch.int64)
    return layer


def _change_adapters(layer: Layer, change: Callable) -> None:
    layer.projections = [p.of(p.weight, p.lora.__class__(*change(*p.lora))) for p in layer.projections]


def _call(kernel, direction: str, arguments: tuple) -> tuple:
    function = getattr(module(kernel, "experts"), f"experts_{direction}")
    return module(kernel, "replay").replayed(function, *arguments)


def _step(kernel, layer: Layer) -> None:
    _, *saved = _call(kernel, "forward", layer.forward_arguments())
    _call(kernel, "backward", layer.backward_arguments(tuple(saved)))


def _tensors(values: tuple) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, tuple):
            yield from _tensors(value)
        elif isinstance(value, torch.Tensor):
            yield value


@contextmanager
def _at_each_allocation(note: Callable[[torch.Tensor], None]) -> Iterator[None]:
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
def _made() -> Iterator[list[torch.Tensor]]:
    """All tensors that are made inside. They are kept, so each has an address of its own."""
    made = []
    with _at_each_allocation(made.append):
        yield made


def _trace(kernel, compiler, direction: str, arguments: tuple) -> tuple[list, tuple]:
    """What a call launches and returns, with addresses named by whose they are; and its results. Its kernels have been
    compiled."""
    first = len(compiler.launched)
    with _made() as made, mock.patch.object(module(kernel, "record"), "SMALL", 0):
        results = _call(kernel, direction, arguments)
    names = {tensor.data_ptr(): f"argument {i}" for i, tensor in enumerate(_tensors(arguments))}

    def named(value):
        if isinstance(value, tuple):
            return tuple(map(named, value))
        if isinstance(value, TensorDescriptor):
            fields = vars(value).items()
            return tuple((name, named(x.data_ptr()) if name == "base" else x) for name, x in fields)
        address = value.data_ptr() if isinstance(value, torch.Tensor) else value
        for tensor in made:
            if isinstance(address, int) and _holds(tensor, address):
                start = tensor.data_ptr()
                return names.setdefault(start, f"memory {len(names)}"), address - start
        return names.get(address, address)

    launches = zip(compiler.launched[first:], compiler.arguments[first:])
    trace = [(name, named(arguments[:3] + arguments[BEFORE:])) for name, arguments in launches]
    trace += [x if x is None else (named(x), x.shape, x.stride(), x.dtype) for x in results]
    return [*trace, type(results)], results


@pytest.mark.parametrize("tokens", [1, 24])
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_launches_what_the_code_does(kernel, compiler, replays, kind, tokens, request):
    if "fast" in kind:
        request.getfixturevalue("fast")
    _layer(kernel, kind, tokens).step()
    traces = []
    for _ in range(4):
        layer = _layer(kernel, kind, tokens)
        forward, (_, *saved) = _trace(kernel, compiler, "forward", layer.forward_arguments())
        backward, _ = _trace(kernel, compiler, "backward", layer.backward_arguments(tuple(saved)))
        traces.append((forward, backward))
    assert traces[0] == traces[1] == traces[2] == traces[3]
    assert replays == [True] * 4, "forward and backward, from the third step on"


@pytest.mark.parametrize("kind", LAYERS)
def test_a_step_of_many_tokens_launches_what_the_code_does(kernel, compiler, replays, many, kind):
    test_a_training_step_launches_what_the_code_does(kernel, compiler, replays, kind, MANY, None)
    descriptors = [x for arguments in compiler.arguments for x in arguments if isinstance(x, TensorDescriptor)]
    assert len(descriptors) > 5 * 4, "a step reads weights by four products, of which two are in halves or all in parts"


@pytest.mark.parametrize("kind", [*KINDS, "4 bit, fast"])
def test_inference_launches_what_the_code_does(kernel, compiler, replays, kind, request):
    if "fast" in kind:
        request.getfixturevalue("fast")
    _layer(kernel, kind, tokens=3).forward(save=False)
    calls = [_layer(kernel, kind, tokens=3).forward_arguments(save=False) for _ in range(3)]
    first, again, replayed = (_trace(kernel, compiler, "forward", call)[0] for call in calls)
    assert first == again == replayed and replays == [True]


def _changed(kernel, change: str) -> tuple:
    """Arguments of forward, of another form than those of ``_layer(kernel)``."""
    layer = _layer(kernel, tokens=23 if change == "tokens" else 24)
    hidden, index, weights, gate_up, down, seed, activation, save, result = layer.forward_arguments()
    if change == "dtype of the index":
        index = index.int()
    if change == "strides of the tokens":
        hidden = torch.empty(H, 24, dtype=BF16).t()
    if change == "strides of a weight":
        gate_up = gate_up.of(torch.empty(E, H, 2 * I, dtype=BF16).transpose(1, 2), gate_up.lora)
    if change == "dtype of the factors":
        down = down.of(down.weight, down.lora._replace(A=down.lora.A.half(), B=down.lora.B.half()))
    if change == "scaling":
        down = down.of(down.weight, down.lora._replace(scaling=3.0))
    if change == "no adapter":
        down = down.of(down.weight, None)
    if change == "dropout":
        down, seed = down.of(down.weight, down.lora._replace(dropout=0.5)), torch.zeros(1, dtype=torch.int64)
    activation = "gelu" if change == "activation" else activation
    return hidden, index, weights, gate_up, down, seed, activation, save and change != "inference", result


CHANGES = ["tokens", "dtype of the index", "strides of the tokens", "strides of a weight", "dtype of the factors"]
CHANGES += ["scaling", "no adapter", "dropout", "activation", "inference"]


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_code_decides_by_is_not_replayed_for_another(kernel, compiler, replays, change):
    for _ in range(3):
        _call(kernel, "forward", _layer(kernel).forward_arguments())
    assert replays == [True]
    module(kernel, "experts").experts_forward(*_changed(kernel, change))
    first, _ = _trace(kernel, compiler, "forward", _changed(kernel, change))
    assert replays == [True], "the code has run"
    again, _ = _trace(kernel, compiler, "forward", _changed(kernel, change))
    replayed, _ = _trace(kernel, compiler, "forward", _changed(kernel, change))
    assert first == again == replayed and replays == [True, True]


def test_backward_with_other_gradients_is_not_replayed(kernel, compiler, replays):
    layer = _layer(kernel)
    for _ in range(3):
        _step(kernel, layer)
    layer.trained = True
    _step(kernel, layer)
    assert replays == [True, True, True] and compiler.launched.count("_weight_grad_kernel") == 2


def _misaligned(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)


def test_a_misaligned_argument_is_left_to_the_code(kernel, compiler, replays):
    """Compiled kernels rely on aligned addresses."""
    arguments = _layer(kernel).forward_arguments()
    for _ in range(3):
        _call(kernel, "forward", arguments)
    moved = (_misaligned(arguments[0]), *arguments[1:])
    for _ in range(2):
        _call(kernel, "forward", moved)
    _call(kernel, "forward", arguments)
    assert replays == [True, False, False, True]


def test_no_record_is_made_of_misaligned_arguments(kernel, compiler, replays):
    hidden, *others = _layer(kernel).forward_arguments()
    for _ in range(4):
        _call(kernel, "forward", (_misaligned(hidden), *others))
    assert replays == []


def test_arguments_that_were_one_and_are_two(kernel, compiler, replays):
    """As the codebook is, which bitsandbytes has once for all stacks."""
    shared, apart = _layer(kernel, "4 bit"), _layer(kernel, "4 bit")
    gate_up, down = shared.projections
    shared.projections = [gate_up, down.of(down.weight._replace(code=gate_up.weight.code), None)]
    shared.forward()
    calls = [layer.forward_arguments() for layer in (shared, shared, shared, apart)]
    *of_shared, of_apart = (_trace(kernel, compiler, "forward", call)[0] for call in calls)
    assert of_shared[0] == of_shared[2] and replays == [True, False]
    importlib.import_module(f"{kernel.__name__}.form").forget()
    assert of_apart == _trace(kernel, compiler, "forward", calls[-1])[0] != of_shared[0]


@pytest.mark.parametrize("reason", ["a result that is filled", "an index that is copied"])
def test_what_is_not_all_launches_is_never_replayed(kernel, compiler, replays, reason):
    hidden, index, *others, result = _layer(kernel, "dense").forward_arguments()
    if reason == "an index that is copied":
        index = torch.empty(K, 24, dtype=torch.int64).t()
    result = reason != "a result that is filled"
    for _ in range(4):
        _call(kernel, "forward", (hidden, index, *others, result))
    assert replays == [] and compiler.launched


def _whole(launch, x):
    launch(x, out := torch.empty_like(x))
    return (out,)


def _inside_of_memory(launch, x):
    launch(torch.empty_like(x)[:, 4:], out := torch.empty_like(x))
    return (out,)


def _inside_of_an_argument(launch, x):
    """Another argument may lie there, too; in another call it would not."""
    launch(x[:, 4:], out := torch.empty_like(x))
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


CAN = [_whole, _inside_of_memory]
CANNOT = [_inside_of_an_argument, _written_by_pytorch, _made_by_pytorch, _empty, _elsewhere, _part, _other_shape]
CANNOT += [_other_dtype, _other_strides, _view_of_an_argument, _no_launch]


@pytest.mark.parametrize("function", CAN + CANNOT)
def test_what_can_be_replayed_and_what_cannot(kernel, compiler, replays, function):
    launcher, kernels = module(kernel, "launch"), module(kernel, "combine")

    def launch(x: torch.Tensor, out: torch.Tensor) -> None:
        launcher.launch(kernels._combine_kernel, (1,), 4, 1, (x, x, x, out), (), 8, 1, E, *[1] * 5)

    for _ in range(5):
        (result,) = module(kernel, "replay").replayed(function, launch, x := torch.empty(8, 8))
        (expected,) = function(launch, x)
        assert [f(result) for f in (torch.Tensor.size, torch.Tensor.stride)] == [
            f(expected) for f in (torch.Tensor.size, torch.Tensor.stride)
        ]
        assert (result.dtype, result.device) == (expected.dtype, expected.device)
    assert replays == ([True] * 3 if function in CAN else [])


def test_a_replay_is_on_the_stream_of_its_time(kernel, compiler, replays):
    for compiler.stream in (0, 0, 0, 7):
        compiler.arguments.clear()
        _call(kernel, "forward", _layer(kernel).forward_arguments())
    assert {arguments[3] for arguments in compiler.arguments} == {7} and replays == [True, True]


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


def test_results_are_new_each_time_and_memory_that_is_given_is_used(kernel, compiler, replays):
    arguments = _layer(kernel).forward_arguments()
    first, second = [_call(kernel, "forward", arguments) for _ in range(4)][2:]
    assert not {x.data_ptr() for x in _tensors(first)} & {x.data_ptr() for x in _tensors(second)}
    given = torch.empty_like(first[1])
    for _ in range(3):
        assert _call(kernel, "forward", (*arguments, given))[1] is given
    assert replays == [True] * 3


@pytest.mark.parametrize("tokens", [24, MANY])
@pytest.mark.parametrize("kind", ["adapters", "4 bit"])
def test_nothing_is_kept_but_results(kernel, compiler, replays, kind, tokens, request):
    if tokens == MANY:
        request.getfixturevalue("many")
    for _ in range(3):
        arguments = _layer(kernel, kind, tokens).forward_arguments()
        with _made() as made:
            results = _call(kernel, "forward", arguments)
        left = [*map(weakref.ref, made), *map(weakref.ref, _tensors(arguments))]
        made.clear()
        compiler.arguments.clear()
        del arguments
        assert {id(ref()) for ref in left if ref() is not None} == {id(x) for x in _tensors(results)}
    assert replays == [True]


@pytest.mark.parametrize("tokens, small", [(24, 2**23), (24, 2**13), (MANY, 2**23), (MANY, 2**20)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", ["inference", "forward", "backward"])
def test_what_ends_with_a_call_shares_an_allocation(
    kernel, compiler, replays, call, kind, tokens, small, request, monkeypatch
):
    monkeypatch.setattr(module(kernel, "record"), "SMALL", small)
    if tokens == MANY:
        request.getfixturevalue("many")
    layer = _layer(kernel, kind, tokens)
    arguments = layer.forward_arguments(save=call != "inference")
    if call == "backward":
        arguments = layer.backward_arguments(tuple(layer.forward()[1:]))
    runs = []
    for _ in range(4):  # compiled, by the code, by the code as it is recorded, replayed
        compiler.arguments.clear()
        with _made() as made:
            results = _call(kernel, "backward" if call == "backward" else "forward", arguments)
        values = [*_values(value for launch in compiler.arguments for value in launch[:3] + launch[BEFORE:])]
        runs.append((values, made))
        if len(runs) == 1:
            importlib.import_module(f"{kernel.__name__}.form").forget()
    _, (values, made), _, (others, others_made) = runs
    assert replays == [True]

    moved = [set() for _ in made]  # where in the replay lies what the code has allocated
    for value, other in zip(values, others, strict=True):
        owners = [i for i, x in enumerate(made) if isinstance(value, int) and _holds(x, value)]
        for i in owners:
            moved[i].add(other + made[i].data_ptr() - value)
        assert owners or value == other
    assert all(len(starts) < 2 for starts in moved), "each in one place"
    spans = sorted((start, start + x.nbytes) for x, starts in zip(made, moved) for start in starts)
    assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:])), "none on another"
    assert all(any(_holds(x, start) and _holds(x, end - 1) for x in others_made) for start, end in spans)

    returned = {x.data_ptr() for x in _tensors(results)}
    (whole,) = [x for x in others_made if x.dtype == torch.uint8 and x.data_ptr() not in returned]
    inside = [(start, end) for start, end in spans if _holds(whole, start)]
    assert all((start - whole.data_ptr()) % 512 == 0 for start, _ in inside), "as PyTorch's allocations are"
    assert whole.nbytes == sum(-(-(end - start) // 512) * 512 for start, end in inside) <= small
    apart = [x.nbytes for x in others_made if x is not whole and x.data_ptr() not in returned]
    assert max(end - start for start, end in inside) <= min(apart, default=small) and (small < 2**23 or not apart)


def _values(arguments: Iterable) -> Iterator:
    """What launches were given, tuples and descriptors taken apart."""
    for value in arguments:
        if isinstance(value, TensorDescriptor):
            yield from (value.base.data_ptr(), value.shape, value.strides, value.block_shape)
        elif isinstance(value, tuple):
            yield from _values(value)
        else:
            yield value


def _holds(tensor: torch.Tensor, address: int) -> bool:
    return 0 <= address - tensor.data_ptr() < tensor.nbytes


@pytest.mark.parametrize("tokens", [24, MANY])
@pytest.mark.parametrize("kind", KINDS)
def test_no_more_memory_at_any_time(kernel, compiler, replays, kind, tokens, request, monkeypatch):
    compiler.arguments = deque(maxlen=0)  # keeps none alive
    if tokens == MANY:
        request.getfixturevalue("many")

    monkeypatch.setattr(module(kernel, "record"), "SMALL", 0)  # that much more, see above

    def peaks() -> list[int]:
        layer = _layer(kernel, kind, tokens)
        with _counted() as forward:
            _, *saved = _call(kernel, "forward", layer.forward_arguments())
        arguments = layer.backward_arguments(tuple(saved))
        with _counted() as backward:
            _call(kernel, "backward", arguments)
        return [max(forward), max(backward)]

    _layer(kernel, kind, tokens).step()
    by_code, recorded, replayed = [peaks() for _ in range(3)]
    assert recorded == by_code and all(a <= b for a, b in zip(replayed, by_code)) and replays == [True, True]


@pytest.mark.parametrize("tokens", [24, MANY])
@pytest.mark.parametrize("kind", KINDS)
def test_launches_are_given_memory_that_is_there(kernel, compiler, replays, kind, tokens, request, monkeypatch):
    monkeypatch.setattr(module(kernel, "record"), "SMALL", 2**13)
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
            given = {x for x in _values(arguments[BEFORE:]) if isinstance(x, int)} & addresses
            assert all(any(start <= x < end for start, end in living.values()) for x in given)

    for step in range(4):
        layer = _layer(kernel, kind, tokens)
        addresses.clear()  # where this layer lies, others have lain
        if step == 3:
            compiler.arguments = Launches()
        with _at_each_allocation(note):
            _step(kernel, layer)
    assert replays == [True] * 4


@contextmanager
def _counted() -> Iterator[list[int]]:
    """The bytes that are allocated inside, after each allocation."""
    held, found = {}, []

    def note(tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        held[id(storage)] = -(-storage.nbytes() // 512) * 512  # as on a GPU
        weakref.finalize(storage, held.pop, id(storage))
        found.append(sum(held.values()))

    with _at_each_allocation(note):
        yield found


def test_as_many_forms_as_there_are_lengths_of_batches_are_not_all_kept(kernel, compiler, replays, monkeypatch):
    monkeypatch.setattr(importlib.import_module(f"{kernel.__name__}.form"), "_MOST", 5)
    for tokens in range(1, 30):
        _call(kernel, "forward", _layer(kernel, "dense", tokens).forward_arguments())
        assert len(module(kernel, "replay")._records) <= 5


def test_a_kernel_that_is_compiled_meanwhile_is_no_part_of_a_record(kernel, compiler, replays):
    arguments = _layer(kernel, "dense").forward_arguments()
    _call(kernel, "forward", arguments)
    module(kernel, "launch")._compiled.clear()
    compiler.launched.clear()
    for _ in range(3):
        _call(kernel, "forward", arguments)
    assert replays == [] and len(compiler.launched) % 3 == 0


@pytest.mark.parametrize("kind", ["adapters", "4 bit with adapters"])
def test_backward_goes_by_the_strides_that_saved_tensors_come_back_with(kernel, compiler, replays, kind):
    """``torch.autograd.graph.save_on_cpu`` gives them back contiguous."""
    layer = _layer(kernel, kind)
    _change_adapters(layer, lambda A, B, *rest: (A, torch.empty(*B.shape[1:], E).permute(2, 0, 1), *rest))
    kept = [projection.leaves() for projection in layer.projections]
    assert not any(B.is_contiguous() for _, _, B in kept)
    for came_back in (kept, [(weight, A, B.contiguous()) for weight, A, B in kept]):
        projections = [p.without_leaves().with_leaves(*leaves) for p, leaves in zip(layer.projections, came_back)]
        wanted = [p.of(p.weight, p.lora).form for p in projections]
        assert [p.form for p in projections] == wanted
    assert all(form != p.form for form, p in zip(wanted, layer.projections))


def test_saved_tensors_that_come_back_in_another_dtype_are_left_to_the_code(kernel, compiler, replays):
    """From a hook that keeps them smaller, as it may in some layers and not in others."""
    layer = _layer(kernel, "dense")
    layer.step()
    _, *saved = layer.forward()
    smaller = [x.to(torch.float8_e5m2) if x is not None and x.dtype == BF16 else x for x in saved]
    for came_back in (saved, saved, saved, smaller):
        _call(kernel, "backward", layer.backward_arguments(tuple(came_back)))
    assert replays == [True]


def test_numbers_that_cannot_be_hashed_are_left_to_the_code(kernel, compiler, replays):
    layer = _layer(kernel, "4 bit")
    layer.projections = [p.of(p.weight._replace(shape=[*p.weight.shape]), None) for p in layer.projections]
    for _ in range(3):
        _step(kernel, layer)
    assert replays == [] and compiler.launched


def test_one_thread_records_at_a_time(kernel, compiler, replays):
    """PyTorch's note that a dispatch mode is on would stay, where two of them are entered and left in turns."""
    replay, noted = module(kernel, "replay"), []
    launcher, kernels = module(kernel, "launch"), module(kernel, "combine")

    def function(meanwhile: Callable, x: torch.Tensor) -> tuple:
        launcher.launch(kernels._combine_kernel, (1,), 4, 1, (x, x, x, x), (), 8, 1, E, *[1] * 5)
        meanwhile()
        noted.append(launcher.thread.recording is not None)
        return (x,)

    def other() -> None:
        replay.replayed(function, idle, y)

    def idle() -> None:
        pass

    def other_thread() -> None:
        if len(noted) == 3:  # both have been called once
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

    x, y = torch.empty(8), torch.empty(9)
    replay.replayed(function, other_thread, x)
    other()
    noted.append(None)
    replay.replayed(function, other_thread, x)
    assert noted == [False, False, None, False, True], "the other thread's call was not recorded"
    for _ in range(2):
        other()
    assert noted[-1] is True and replays == [True], "but the one after it"
