"""One step of Adam over states in bitsandbytes' 8 bit, whose codes and values are computed instead of looked up.

A state is codes into a table of 256 values in [-1, 1] or [0, 1], times the largest magnitude of its block of 256. A
program has a whole block, so it knows the new largest without another pass. The tables are bitsandbytes' dynamic maps:
zero, one, and the middles of equal parts of seven decades, each in twice as many parts as the decade below.

Number the values upwards, such that decade i begins at ``lowest * 2**i``, where ``lowest`` is its parts in the lowest:

    number(x) = the least of 14 lines at x, rounded down       value(number) = the greatest of 7 lines at number + 1/2

Each decade is a line. From one to the next the slope falls, so the line that holds at x is the least, and read the
other way the greatest. The midpoint between two decades is on neither's line, nor is that between zero and the first
value: a line goes through each, and cuts off no other midpoint. To search a table takes nine loads for each code, one
after the other, which bound a kernel at several times what its memory traffic needs. Values could be read from it, and
would be exact; but for loads by an index Triton moves data between threads and back.

A value as near to two others as fp32 can tell may become either. An element whose gradient is not finite, or has no
finite square in fp32, keeps its parameter and gets states of zero, so that the others of its block do not become NaN.
bitsandbytes' kernel does so with the former. As there, a negative first moment never becomes zero.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime import driver

BLOCK = 256
"""The elements of a state that share one ``absmax``."""

WARPS = 1
"""Of a program. More, with as many blocks a program, took 8 to 12 % longer on an H200."""

Lines = tuple[tuple[float, float], ...]
"""Each a slope, and the value at zero."""


def _decades(lowest: int) -> list[tuple[float, float, int]]:
    """Of each decade: its end, one part of it, and the number of the first value after it."""
    ends = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0]
    return [(end, 0.9 * end / (lowest << i), 2 * lowest << i) for i, end in enumerate(ends)]


def _number_lines(lowest: int) -> Lines:
    """Where these reach a number, x is the midpoint between it and the number before."""
    half = 1e-6 * (0.1 + 0.45 / lowest) / 2  # of the first value
    decades = _decades(lowest)
    within = [(1 / part, number - end / part) for end, part, number in decades]
    between = [(1 / (3 * part), number - (end + part) / (3 * part)) for end, part, number in decades[:-1]]
    return ((1 / half, lowest - 1.0), *within, *between)


def _value_lines(lowest: int) -> Lines:
    return tuple((part, end - part * number) for end, part, number in _decades(lowest))


SIGNED, UNSIGNED = 1, 2
"""``lowest`` of either table."""

_NUMBER_SIGNED, _VALUE_SIGNED = tl.constexpr(_number_lines(SIGNED)), tl.constexpr(_value_lines(SIGNED))
_NUMBER_UNSIGNED, _VALUE_UNSIGNED = tl.constexpr(_number_lines(UNSIGNED)), tl.constexpr(_value_lines(UNSIGNED))


@triton.jit
def _number(x, LINES: tl.constexpr, ONE: tl.constexpr):
    """Of the value nearest to x in [0, 1]. ONE is that of 1.0; the midpoint before it is a quarter of a part below."""
    least = x * LINES[0][0] + LINES[0][1]
    for i in tl.static_range(1, 14):
        least = tl.minimum(least, x * LINES[i][0] + LINES[i][1])
    return tl.where(least < ONE - 0.25, least, ONE).to(tl.int32)


@triton.jit
def _value(number, LINES: tl.constexpr):
    """At the number of zero all lines are negative; that of 1.0 is half a part past the end of the last."""
    middle = number.to(tl.float32) + 0.5
    greatest = middle * LINES[0][0] + LINES[0][1]
    for i in tl.static_range(1, 7):
        greatest = tl.maximum(greatest, middle * LINES[i][0] + LINES[i][1])
    return tl.minimum(tl.maximum(greatest, 0.0), 1.0)


@triton.jit
def _decode_signed(code):
    value = _value(tl.abs(code - 127), _VALUE_SIGNED)
    return tl.where(code < 127, -value, value)


@triton.jit
def _decode_unsigned(code):
    return _value(code + 1, _VALUE_UNSIGNED)


@triton.jit
def _encode_signed(size, negative):
    """The code of ``size``, or of its negative: that is not zero, nor -1.0, which the table lacks."""
    number = _number(size, _NUMBER_SIGNED, 128)
    return tl.where(negative, 127 - tl.minimum(tl.maximum(number, 1), 127), 127 + number)


@triton.jit
def _encode_unsigned(size):
    return _number(size, _NUMBER_UNSIGNED, 256) - 1


@triton.jit
def _over(largest):
    """Its inverse, or zero where that is none."""
    normal = largest >= 1.2e-38
    return tl.where(normal, 1.0 / tl.where(normal, largest, 1.0), 0.0)


@triton.jit
def _adam_kernel(
    # pointers
    p, grad, codes1, codes2, absmax1, absmax2,
    # sizes
    n,
    # settings
    beta1, beta2, eps, step_size, kept,
    # meta
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(n, BLOCK),): a block, whose p and states it changes in their place.

    p, grad, codes1 and codes2 (n,), absmax1 and absmax2 (cdiv(n, BLOCK),). Of p, ``kept`` is what weight decay leaves;
    ``eps`` and ``step_size`` have both moments' corrections in them.
    """
    block = tl.program_id(0)
    start = block.to(tl.int64) * BLOCK
    at = tl.arange(0, BLOCK)
    inside = at < n - start

    g = tl.load(grad + start + at, mask=inside, other=0.0).to(tl.float32)
    code1 = tl.load(codes1 + start + at, mask=inside, other=0).to(tl.int32)
    code2 = tl.load(codes2 + start + at, mask=inside, other=0).to(tl.int32)
    old = tl.load(p + start + at, mask=inside, other=0.0).to(tl.float32)
    first = _decode_signed(code1) * tl.load(absmax1 + block)
    second = _decode_unsigned(code2) * tl.load(absmax2 + block)

    changed = inside & (g * g < float("inf"))
    first = tl.where(changed, first * beta1 + (1.0 - beta1) * g, 0.0)
    second = tl.where(changed, second * beta2 + (1.0 - beta2) * g * g, 0.0)
    new = (old - step_size * first / (tl.sqrt(second) + eps)) * kept
    tl.store(p + start + at, tl.where(changed, new, old).to(p.dtype.element_ty), mask=inside)

    size = tl.abs(first)
    largest1, largest2 = tl.max(size, axis=0), tl.max(second, axis=0)
    code1 = _encode_signed(size * _over(largest1), first < 0.0)
    code2 = _encode_unsigned(second * _over(largest2))
    tl.store(codes1 + start + at, code1.to(tl.uint8), mask=inside)
    tl.store(codes2 + start + at, code2.to(tl.uint8), mask=inside)
    tl.store(absmax1 + block, largest1)
    tl.store(absmax2 + block, largest2)


def adam_step(
    p: torch.Tensor,
    grad: torch.Tensor,
    state: dict,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Counts a step in ``state``, and changes ``p`` and ``state`` by it, in one launch on the current stream.

    Args:
        p: contiguous, fp32, fp16 or bf16; ``grad`` likewise.
        state: as bitsandbytes keeps it: step, and of both moments state (codes), absmax and qmap (table).
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``.
    """
    beta1, beta2, step = betas[0], betas[1], state["step"] + 1
    correction = (1.0 - beta2**step) ** 0.5
    step_size = lr * correction / (1.0 - beta1**step)
    settings = float(beta1), float(beta2), float(eps * correction), float(step_size), float(1.0 - lr * weight_decay)
    tensors = p, grad, state["state1"], state["state2"], state["absmax1"], state["absmax2"]
    with torch.cuda.device_of(p):
        _launch(tensors, p.numel(), settings)
    state["step"] = step


_compiled: dict[tuple, Any] = {}


def _launch(tensors: tuple[torch.Tensor, ...], n: int, settings: tuple[float, ...]) -> None:
    """``_adam_kernel[grid](...)``, which returns what it compiled. From then on that is launched directly: Triton would
    look into every argument of each of hundreds of launches a step, and ask the driver about every address."""
    grid = triton.cdiv(n, BLOCK)
    if not isinstance(_adam_kernel, triton.JITFunction):  # Triton's interpreter compiles nothing
        _adam_kernel[(grid,)](*tensors, n, *settings, BLOCK)
        return
    device, addresses = torch.cuda.current_device(), [tensor.data_ptr() for tensor in tensors]
    aligned = [address % 16 == 0 for address in addresses]
    key = device, tensors[0].dtype, n % 16 == 0, n == 1, n < 2**31, *aligned  # what Triton compiles a kernel for
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = _adam_kernel[(grid,)](*tensors, n, *settings, BLOCK, num_warps=WARPS)
        return
    stream = driver.active.get_current_stream(device)
    compiled.run(
        grid, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None,
        *addresses, n, *settings, BLOCK,
    )  # fmt: skip
