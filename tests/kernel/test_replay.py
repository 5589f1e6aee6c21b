"""Replayed calls: they launch what the code would, and all that the code decides by makes a call of another form."""

import importlib
import threading
from collections.abc import Callable

import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from .absent import BF16, LAYERS, E, H, I, K, module
from .replays import (
    KINDS,
    MANY,
    change_adapters,
    make_layer,
    replayed_call,
    replayed_step,
    tensors_in,
    trace_of,
)

CHANGES = ["tokens", "dtype of the index", "strides of the tokens", "strides of a weight", "dtype of the factors"]
CHANGES += ["scaling", "no adapter", "dropout", "activation", "inference"]


@pytest.mark.parametrize("tokens", [1, 24])
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_launches_what_the_code_does(kernel, compiler, replays, kind, tokens, request):
    if "fast" in kind:
        request.getfixturevalue("fast")
    make_layer(kernel, kind, tokens).step()
    traces = []
    for _ in range(4):
        layer = make_layer(kernel, kind, tokens)
        forward, (_, *saved) = trace_of(kernel, compiler, "forward", layer.forward_arguments())
        backward, _ = trace_of(kernel, compiler, "backward", layer.backward_arguments(tuple(saved)))
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
    make_layer(kernel, kind, tokens=3).forward(save=False)
    calls = [make_layer(kernel, kind, tokens=3).forward_arguments(save=False) for _ in range(3)]
    first, again, replayed = (trace_of(kernel, compiler, "forward", call)[0] for call in calls)
    assert first == again == replayed and replays == [True]


def _changed(kernel, change: str) -> tuple:
    """Arguments of forward, of another form than those of ``make_layer(kernel)``."""
    layer = make_layer(kernel, tokens=23 if change == "tokens" else 24)
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


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_code_decides_by_is_not_replayed_for_another(kernel, compiler, replays, change):
    for _ in range(3):
        replayed_call(kernel, "forward", make_layer(kernel).forward_arguments())
    assert replays == [True]
    module(kernel, "experts").experts_forward(*_changed(kernel, change))
    first, _ = trace_of(kernel, compiler, "forward", _changed(kernel, change))
    assert replays == [True], "the code has run"
    again, _ = trace_of(kernel, compiler, "forward", _changed(kernel, change))
    replayed, _ = trace_of(kernel, compiler, "forward", _changed(kernel, change))
    assert first == again == replayed and replays == [True, True]


def test_backward_with_other_gradients_is_not_replayed(kernel, compiler, replays):
    layer = make_layer(kernel)
    for _ in range(3):
        replayed_step(kernel, layer)
    layer.trained = True
    replayed_step(kernel, layer)
    assert replays == [True, True, True] and compiler.launched.count("_weight_grad_kernel") == 2


def _misaligned(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)


def test_a_misaligned_argument_is_left_to_the_code(kernel, compiler, replays):
    """Compiled kernels rely on aligned addresses."""
    arguments = make_layer(kernel).forward_arguments()
    for _ in range(3):
        replayed_call(kernel, "forward", arguments)
    moved = (_misaligned(arguments[0]), *arguments[1:])
    for _ in range(2):
        replayed_call(kernel, "forward", moved)
    replayed_call(kernel, "forward", arguments)
    assert replays == [True, False, False, True]


def test_no_record_is_made_of_misaligned_arguments(kernel, compiler, replays):
    hidden, *others = make_layer(kernel).forward_arguments()
    for _ in range(4):
        replayed_call(kernel, "forward", (_misaligned(hidden), *others))
    assert replays == []


def test_arguments_that_were_one_and_are_two(kernel, compiler, replays):
    """As the codebook is, which bitsandbytes has once for all stacks."""
    shared, apart = make_layer(kernel, "4 bit"), make_layer(kernel, "4 bit")
    gate_up, down = shared.projections
    shared.projections = [gate_up, down.of(down.weight._replace(code=gate_up.weight.code), None)]
    shared.forward()
    calls = [layer.forward_arguments() for layer in (shared, shared, shared, apart)]
    *of_shared, of_apart = (trace_of(kernel, compiler, "forward", call)[0] for call in calls)
    assert of_shared[0] == of_shared[2] and replays == [True, False]
    importlib.import_module(f"{kernel.__name__}.form").forget()
    assert of_apart == trace_of(kernel, compiler, "forward", calls[-1])[0] != of_shared[0]


@pytest.mark.parametrize("reason", ["a result that is filled", "an index that is copied"])
def test_what_is_not_all_launches_is_never_replayed(kernel, compiler, replays, reason):
    hidden, index, *others, result = make_layer(kernel, "dense").forward_arguments()
    if reason == "an index that is copied":
        index = torch.empty(K, 24, dtype=torch.int64).t()
    result = reason != "a result that is filled"
    for _ in range(4):
        replayed_call(kernel, "forward", (hidden, index, *others, result))
    assert replays == [] and compiler.launched


def test_a_replay_is_on_the_stream_of_its_time(kernel, compiler, replays):
    for compiler.stream in (0, 0, 0, 7):
        compiler.arguments.clear()
        replayed_call(kernel, "forward", make_layer(kernel).forward_arguments())
    assert {arguments[3] for arguments in compiler.arguments} == {7} and replays == [True, True]


def test_results_are_new_each_time_and_memory_that_is_given_is_used(kernel, compiler, replays):
    arguments = make_layer(kernel).forward_arguments()
    first, second = [replayed_call(kernel, "forward", arguments) for _ in range(4)][2:]
    assert not {x.data_ptr() for x in tensors_in(first)} & {x.data_ptr() for x in tensors_in(second)}
    given = torch.empty_like(first[1])
    for _ in range(3):
        assert replayed_call(kernel, "forward", (*arguments, given))[1] is given
    assert replays == [True] * 3


def test_as_many_forms_as_there_are_lengths_of_batches_are_not_all_kept(kernel, compiler, replays, monkeypatch):
    monkeypatch.setattr(importlib.import_module(f"{kernel.__name__}.form"), "_MOST", 5)
    for tokens in range(1, 30):
        replayed_call(kernel, "forward", make_layer(kernel, "dense", tokens).forward_arguments())
        assert len(module(kernel, "replay")._records) <= 5


def test_a_kernel_that_is_compiled_meanwhile_is_no_part_of_a_record(kernel, compiler, replays):
    arguments = make_layer(kernel, "dense").forward_arguments()
    replayed_call(kernel, "forward", arguments)
    module(kernel, "launch")._launchers.clear()
    compiler.launched.clear()
    for _ in range(3):
        replayed_call(kernel, "forward", arguments)
    assert replays == [] and len(compiler.launched) % 3 == 0


@pytest.mark.parametrize("kind", ["adapters", "4 bit with adapters"])
def test_backward_goes_by_the_strides_that_saved_tensors_come_back_with(kernel, compiler, replays, kind):
    """``torch.autograd.graph.save_on_cpu`` gives them back contiguous."""
    layer = make_layer(kernel, kind)
    change_adapters(layer, lambda A, B, *rest: (A, torch.empty(*B.shape[1:], E).permute(2, 0, 1), *rest))
    layer.step()
    _, *saved = layer.forward()
    leaves = [projection.leaves() for projection in layer.projections]
    for came_back in (leaves, leaves, leaves, [(weight, A, B.contiguous()) for weight, A, B in leaves]):
        rest = [projection.without_leaves() for projection in layer.projections]
        projections = [projection.with_leaves(*each) for projection, each in zip(rest, came_back)]
        assert [p.form for p in projections] == [p.of(p.weight, p.lora).form for p in projections]
        arguments = layer.backward_arguments(tuple(saved))
        arguments = (*arguments[:4], *projections, *arguments[6:])
        trace, _ = trace_of(kernel, compiler, "backward", arguments)
    assert replays == [True], "those with the strides that were recorded, and no others"
    importlib.import_module(f"{kernel.__name__}.form").forget()
    assert trace == trace_of(kernel, compiler, "backward", arguments)[0]


def test_saved_tensors_that_come_back_in_another_dtype_are_left_to_the_code(kernel, compiler, replays):
    """From a hook that keeps them smaller, as it may in some layers and not in others."""
    layer = make_layer(kernel, "dense")
    layer.step()
    _, *saved = layer.forward()
    smaller = [x.to(torch.float8_e5m2) if x is not None and x.dtype == BF16 else x for x in saved]
    for came_back in (saved, saved, saved, smaller):
        replayed_call(kernel, "backward", layer.backward_arguments(tuple(came_back)))
    assert replays == [True]


def test_numbers_that_cannot_be_hashed_are_left_to_the_code(kernel, compiler, replays):
    layer = make_layer(kernel, "4 bit")
    layer.projections = [p.of(p.weight._replace(shape=[*p.weight.shape]), None) for p in layer.projections]
    for _ in range(3):
        replayed_step(kernel, layer)
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
