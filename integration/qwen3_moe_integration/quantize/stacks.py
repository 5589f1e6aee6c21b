"""A stack of expert matrices (E, N, K) as one ``Params4bit`` of bitsandbytes.

bitsandbytes packs a tensor flat: two weights per byte, and one ``absmax`` for each ``blocksize`` consecutive weights.
So a stack is its experts one after another, and can be made of them one at a time. Only the second quantization, of
the ``absmax`` themselves, looks at the whole stack: it subtracts their mean.

Every error names the stack as the model does.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from functools import cache
from itertools import islice
from typing import Any, Optional

import torch
from bitsandbytes.functional import (
    QuantState,
    create_dynamic_map,
    dequantize_4bit,
    dequantize_blockwise,
    get_4bit_type,
    quantize_4bit,
    quantize_blockwise,
)
from bitsandbytes.nn import Params4bit
from torch import nn

Tensor = torch.Tensor

QUANT_TYPES = ("nf4", "fp4")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256  # absmax that share a scale, when they are quantized themselves
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def quantize_stack(name: str, experts: Iterable[Tensor], shape: Sequence[int], settings: Any) -> Params4bit:
    """The stack in 4 bit, bit for bit what ``bitsandbytes.functional.quantize_4bit`` makes of the whole of it.

    Args:
        name: of the stack, for errors.
        experts: E matrices (N, K), taken one by one: no more than a few are in memory at a time.
        shape: (E, N, K).
        settings: a ``MoeBitsAndBytesConfig``.

    Raises:
        ValueError: a matrix has another shape or is no 16- or 32-bit float, or their number is not E.
    """
    blocksize, numel = settings.experts_blocksize, math.prod(shape)
    _check_shape(name, shape)
    remaining = _checked(name, experts, tuple(shape))
    packed, absmax, done = None, None, 0
    # As many experts as it takes for the last block to end with one of them: mostly a single one.
    while group := list(islice(remaining, blocksize // math.gcd(blocksize, shape[1] * shape[2]))):
        flat = torch.cat([expert.reshape(-1) for expert in group]) if len(group) > 1 else group[0].reshape(-1)
        data, state = quantize_4bit(flat, blocksize=blocksize, quant_type=settings.bnb_4bit_quant_type)
        if packed is None:
            packed = data.new_empty(numel // 2)
            absmax = state.absmax.new_empty(-(-numel // blocksize))
        packed[done // 2 : done // 2 + data.numel()] = data.flatten()
        absmax[done // blocksize : done // blocksize + state.absmax.numel()] = state.absmax
        done += flat.numel()
    if done != numel:
        raise ValueError(f"{name}: the checkpoint has {done // math.prod(shape[1:])} of its {shape[0]} experts")
    state = QuantState(
        absmax,
        shape=torch.Size(shape),
        code=state.code,
        blocksize=blocksize,
        quant_type=settings.bnb_4bit_quant_type,
        dtype=settings.bnb_4bit_compute_dtype,
    )
    if settings.bnb_4bit_use_double_quant:
        offset = absmax.mean()
        state.absmax, state.state2 = quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCKSIZE)
        state.offset, state.nested = offset, True
    return _parameter(name, packed, state, settings.bnb_4bit_quant_storage)


def read_stack(name: str, packed: Tensor, statistics: Mapping[str, Tensor], storage: torch.dtype) -> Params4bit:
    """A tensor that bitsandbytes packed, of what it saved.

    Args:
        name: for errors.
        packed: the data.
        statistics: what was beside it: absmax, quant_map, nested_absmax and nested_quant_map if absmax is quantized
            itself, and quant_state, which is JSON.
        storage: dtype that config.json says the data have; bytes will do.

    Raises:
        ValueError: an entry is missing, cannot be read, or does not fit the others or the data.
    """
    missing = {"absmax", "quant_map", "quant_state"} - statistics.keys()
    if missing:
        raise ValueError(f"{name} is in 4 bit, but the checkpoint has no {', '.join(sorted(missing))} of it")
    entries = dict(statistics)
    try:
        numbers = dict(json.loads(bytes(entries.pop("quant_state").tolist())))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: its quant_state cannot be read: {error}") from None
    nested = bool({"nested_absmax", "nested_quant_map"} & entries.keys())
    _check_numbers(name, numbers, nested)
    _check_tensors(name, packed, entries, numbers, nested)
    if packed.dtype not in (torch.uint8, storage):
        raise ValueError(f"{name} must be stored as {storage}, as bnb_4bit_quant_storage says, got {packed.dtype}")
    state = QuantState.from_dict(numbers | entries, device=packed.device)
    return _parameter(name, packed.reshape(-1).view(torch.uint8), state, packed.dtype)


def join_stacks(name: str, projections: Sequence[Sequence[Params4bit]], shape: Sequence[int]) -> Params4bit:
    """One stack of matrices that were quantized apart; no weight changes in the least.

    The packed weights are copied. Where ``absmax`` was quantized, the parts have offsets of their own, so it is
    decoded to fp32 and stays so: exact, for 9 % more memory than if it were quantized again.

    Args:
        projections: for each of the projections whose rows follow each other in the stack (gate, then up), its E
            matrices, or the one stack of them.
        shape: (E, N, K) of the result.

    Raises:
        ValueError: the parts do not make up ``shape``, differ in type or blocksize, or have a block that is shared by
            two experts.
    """
    experts, matrix = shape[0], (shape[1] // len(projections), shape[2])
    shapes = [Counter(tuple(part.quant_state.shape) for part in projection) for projection in projections]
    if any(found not in (Counter({matrix: experts}), Counter({(experts, *matrix): 1})) for found in shapes):
        got = ", ".join(f"{count} of {each}" for found in shapes for each, count in found.items())
        raise ValueError(f"{name}: its parts must make up {tuple(shape)}, got {got}")
    parts = [part for projection in projections for part in projection]
    if parts[0].quant_state.shape == tuple(shape):
        return parts[0]
    first = parts[0].quant_state
    for part in parts:
        state = part.quant_state
        if (state.quant_type, state.blocksize) != (first.quant_type, first.blocksize):
            raise ValueError(
                f"{name}: all parts must be {first.quant_type} with blocksize {first.blocksize} like the first, got "
                f"{state.quant_type} with {state.blocksize}"
            )
        if math.prod(state.shape[-2:]) % state.blocksize:
            raise ValueError(
                f"{name}: a block of {state.blocksize} weights belongs to two experts of shape "
                f"{tuple(state.shape[-2:])}; quantize the full-precision checkpoint instead"
            )
    packed, absmax = (
        torch.cat([torch.cat([get(part) for part in each]).view(experts, -1) for each in projections], dim=1).flatten()
        for get in (_bytes, _decoded_absmax)
    )
    state = QuantState(
        absmax,
        shape=torch.Size(shape),
        code=first.code,
        blocksize=first.blocksize,
        quant_type=first.quant_type,
        dtype=first.dtype,
    )
    return _parameter(name, packed, state, parts[0].quant_storage)


def slice_stack(name: str, stack: Params4bit, first: int, experts: int) -> Params4bit:
    """Some experts of a stack, copied; no weight changes in the least.

    ``absmax`` that is quantized itself stays so where the scales of its own blocks divide between experts; elsewhere it
    is decoded to fp32.

    Raises:
        ValueError: a block is shared by two experts.
    """
    state, matrix = stack.quant_state, check_parts(name, stack)
    blocks = matrix // state.blocksize
    own = slice(first * blocks, (first + experts) * blocks)
    part = QuantState(
        None,
        shape=torch.Size((experts, *state.shape[1:])),
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=state.dtype,
    )
    if state.nested and own.start % state.state2.blocksize == 0 and experts * blocks % state.state2.blocksize == 0:
        nested = state.state2
        scales = slice(own.start // nested.blocksize, own.stop // nested.blocksize)
        part.absmax, part.offset, part.nested = state.absmax[own].clone(), state.offset, True
        part.state2 = QuantState(
            nested.absmax[scales].clone(), code=nested.code, blocksize=nested.blocksize, dtype=nested.dtype
        )
    else:
        part.absmax = _decoded_absmax(stack)[own].clone()
    packed = _bytes(stack)[first * matrix // 2 : (first + experts) * matrix // 2].clone()
    return _parameter(name, packed, part, stack.quant_storage)


def check_parts(name: str, stack: Params4bit) -> int:
    """How many weights an expert of a stack has.

    Raises:
        ValueError: a block is shared by two experts.
    """
    state = stack.quant_state
    matrix = math.prod(state.shape[1:])
    if matrix % state.blocksize:
        raise ValueError(
            f"{name}: a block of {state.blocksize} weights belongs to two experts of shape {tuple(state.shape[1:])}, "
            "so they cannot be parted"
        )
    return matrix


def place_stack(module: nn.Module, projection: str, stack: Params4bit) -> None:
    """Makes a stack one of the two projections of an experts module.

    The module has its state as well: FSDP gathers a parameter as a plain tensor, without one.
    """
    setattr(module, projection, stack)
    module.quant_states = {**getattr(module, "quant_states", {}), projection: stack.quant_state}


def decode(parameter: Params4bit, dtype: Optional[torch.dtype] = None) -> Tensor:
    """What is packed, in the shape of its ``quant_state``, and by default in its dtype.

    Decoded as one row: where a block does not end with a row, bitsandbytes 0.50 scales the next one wrongly on CPUs
    that have AVX-512.
    """
    state = copy(parameter.quant_state)
    state.shape, state.dtype = torch.Size((math.prod(state.shape),)), dtype or state.dtype
    return dequantize_4bit(parameter.data, state).view(parameter.quant_state.shape)


def _bytes(part: Params4bit) -> Tensor:
    return part.data.reshape(-1).view(torch.uint8)


def _decoded_absmax(part: Params4bit) -> Tensor:
    """fp32, computed as bitsandbytes' own dequantization does."""
    state = part.quant_state
    return dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax


def _parameter(name: str, packed: Tensor, state: QuantState, storage: torch.dtype) -> Params4bit:
    if packed.numel() % storage.itemsize:
        raise ValueError(f"{name}: {packed.numel()} bytes cannot be stored as {storage}")
    return Params4bit(
        packed.view(storage)[:, None],
        requires_grad=False,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=storage,
        bnb_quantized=True,
    )


def _checked(name: str, experts: Iterable[Tensor], shape: tuple[int, ...]) -> Iterator[Tensor]:
    for number, expert in enumerate(experts):
        if number == shape[0] or tuple(expert.shape) != shape[1:]:
            raise ValueError(
                f"{name}: the model has {shape[0]} experts of {shape[1:]}, "
                f"the checkpoint's expert {number} is {tuple(expert.shape)}"
            )
        if expert.dtype not in FLOATS:
            raise ValueError(f"{name}: only 16- and 32-bit floats can be quantized, got {expert.dtype}")
        yield expert


def _check_shape(name: str, shape: Sequence[int]) -> None:
    if shape[-1] % 2:
        raise ValueError(f"{name}: two weights share a byte, so its rows must have an even length, got {tuple(shape)}")


def _check_numbers(name: str, numbers: Mapping[str, Any], nested: bool) -> None:
    """What a quant_state says can be: whoever decodes takes it as it is."""
    floats = tuple(str(dtype).removeprefix("torch.") for dtype in FLOATS)
    wanted = {"quant_type": QUANT_TYPES, "blocksize": BLOCKSIZES, "dtype": floats}
    if nested:
        wanted |= {"nested_blocksize": BLOCKSIZES, "nested_dtype": floats}
    for key, allowed in wanted.items():
        if numbers.get(key) not in allowed:
            raise ValueError(f"{name}: its {key} must be one of {allowed}, got {numbers.get(key)!r}")
    shape = numbers.get("shape")
    if not isinstance(shape, list) or len(shape) < 2 or not all(type(size) is int and size > 0 for size in shape):
        raise ValueError(f"{name}: its shape must be a list of two sizes or more, got {shape!r}")
    _check_shape(name, shape)
    offset = numbers.get("nested_offset")
    if nested and not (type(offset) in (int, float) and math.isfinite(offset)):
        raise ValueError(f"{name}: its nested_offset must be a finite number, got {offset!r}")


def _check_tensors(
    name: str, packed: Tensor, statistics: Mapping[str, Tensor], numbers: Mapping[str, Any], nested: bool
) -> None:
    """Data and statistics have as many entries as the shape wants, and the dtypes that bitsandbytes gave them, in which
    alone it reads them; scales are numbers, and the codebooks those of bitsandbytes: of the type, by whose name some
    kernels decode, and of quantized scales, for which it has only one."""
    weights = math.prod(numbers["shape"])
    blocks = -(-weights // numbers["blocksize"])
    wanted = {"absmax": (blocks, torch.uint8 if nested else torch.float32), "quant_map": (16, torch.float32)}
    if nested:
        nested_blocks = -(-blocks // numbers["nested_blocksize"])
        wanted |= {"nested_absmax": (nested_blocks, torch.float32), "nested_quant_map": (256, torch.float32)}
    found = {key: statistics.get(key, torch.empty(0)) for key in wanted}
    wrong = [
        f"{found[key].numel()} {key} of {found[key].dtype} instead of {entries} of {dtype}"
        for key, (entries, dtype) in wanted.items()
        if (found[key].numel(), found[key].dtype) != (entries, dtype)
    ]
    if packed.nbytes != weights // 2:
        wrong.append(f"{packed.nbytes} bytes instead of {weights // 2}")
    if wrong:
        raise ValueError(f"{name}: {', '.join(wrong)} for a shape of {tuple(numbers['shape'])}")
    scales = "nested_absmax" if nested else "absmax"
    if strange := int((~found[scales].isfinite()).sum()):
        raise ValueError(f"{name}: its {scales} must be finite, got {strange} that are not")
    codes = {"quant_map": (get_4bit_type(numbers["quant_type"], device=packed.device), numbers["quant_type"])}
    if nested:
        codes["nested_quant_map"] = (_nested_code().to(packed.device), "bitsandbytes for quantized scales")
    for key, (code, whose) in codes.items():
        if not torch.allclose(found[key].flatten(), code, atol=1e-4):
            raise ValueError(f"{name}: its {key} is not that of {whose}")


@cache
def _nested_code() -> Tensor:
    return create_dynamic_map()
