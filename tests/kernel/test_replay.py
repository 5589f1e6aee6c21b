"""Replayed calls: they launch what the code would, and all that the code decides by makes a call of another form."""

import importlib
import weakref
from collections import deque
from collections.abc import Callable, Iterator
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
    record, found = module(kernel, "replay").Record, []
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
    with _made() as made:
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
            offset = address - tensor.data_ptr() if isinstance(address, int) else -1
            if 0 <= offset < tensor.nbytes:
                return names.setdefault(tensor.data_ptr(), f"memory {len(names)}"), offset
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


@pytest.mark.parametrize("part", ["an argument", "an allocation"])
def test_an_address_inside_of_an_argument_is_nobodys(kernel, compiler, replays, part):
    """It may be that of another argument, too; in another call it would not."""

    def function(slots, weights, index):
        rows = slots[:, 128:] if part == "an argument" else slots.new_empty(6, 256)[:, 128:]
        out = slots.new_empty(3, 128)
        module(kernel, "combine").combine(rows, weights, index, E, out)
        return (out,)

    arguments = torch.empty(6, 256, dtype=BF16), torch.empty(3, 2, dtype=BF16), torch.zeros(3, 2, dtype=torch.int64)
    for _ in range(5):
        module(kernel, "replay").replayed(function, *arguments)
    assert replays == ([] if part == "an argument" else [True] * 3) and len(compiler.launched) == 5


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
    with module(kernel, "replay")._Recording([x]) as recording:
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


@pytest.mark.parametrize("tokens", [24, MANY])
@pytest.mark.parametrize("kind", KINDS)
def test_no_more_memory_at_any_time(kernel, compiler, replays, kind, tokens, request):
    compiler.arguments = deque(maxlen=0)  # keeps none alive
    if tokens == MANY:
        request.getfixturevalue("many")

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


@contextmanager
def _counted() -> Iterator[list[int]]:
    """The bytes that are allocated inside, after each allocation."""
    held, found = {}, []

    def note(tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        held[id(storage)] = storage.nbytes()
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
