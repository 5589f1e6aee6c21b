"""The kernel of 8-bit Adam, in Triton's interpreter on a CPU and on a GPU: TRITON_INTERPRET=1 pytest <this file>.

References: bitsandbytes' tables, and Adam in fp64 from states as they were.
"""

import copy
import os

import pytest
import torch

bitsandbytes = pytest.importorskip("bitsandbytes")
triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from qwen3_moe_integration import adam_kernel, optim  # noqa: E402

BLOCK = adam_kernel.BLOCK
GUARD = 67
"""Elements on either side of a tensor; an odd number, so that no tensor starts where its type would like to."""

SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}
PARTS = ("state1", "state2", "absmax1", "absmax2")
SIZES = [4096, 4096 + 785]

on_gpu = pytest.param("cuda", marks=pytest.mark.gpu)
interpreted = pytest.param(
    "cpu",
    marks=pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="test_optim.py runs it, interpreted"),
)
either = pytest.mark.parametrize("device", [interpreted, on_gpu])


@pytest.fixture(autouse=True)
def steps(monkeypatch) -> list[int]:
    """Lets the class go to the kernel from a CPU, too; the sizes of the parameters that went there."""
    seen = []
    spy = lambda p, *others: seen.append(p.numel()) or adam_kernel.adam_step(p, *others)  # noqa: E731
    monkeypatch.setattr(optim, "DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(optim, "adam_step", spy)
    return seen


# 1. The codes


@triton.jit
def _encode_all(x_ptr, codes, values, SIGNED: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    if SIGNED:
        code = adam_kernel._encode_signed(tl.abs(x), x < 0.0)
        tl.store(values + at, adam_kernel._decode_signed(code))
    else:
        code = adam_kernel._encode_unsigned(x)
        tl.store(values + at, adam_kernel._decode_unsigned(code))
    tl.store(codes + at, code)


def encoded(x: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes of x, and what they decode to."""
    padded = torch.nn.functional.pad(x, (0, -x.numel() % BLOCK))
    codes, values = torch.empty_like(padded, dtype=torch.int32), torch.empty_like(padded)
    _encode_all[(padded.numel() // BLOCK,)](padded, codes, values, signed, BLOCK)
    return codes[: x.numel()], values[: x.numel()]


def table(signed: bool, device: str) -> torch.Tensor:
    return bitsandbytes.functional.create_dynamic_map(signed=signed).to(device)


@either
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_every_value_of_bitsandbytes_table_has_its_code_and_every_code_its_value(device, signed):
    values = table(signed, device)
    codes, decoded = encoded(values, signed)
    assert torch.equal(codes, torch.arange(256, dtype=torch.int32, device=device))
    torch.testing.assert_close(decoded, values, rtol=1e-6, atol=0.0)
    assert decoded[values == 0].eq(0).all() and decoded[-1] == 1


@either
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_a_code_is_of_the_nearest_value(device, signed):
    values = table(signed, device).double()
    middles = (values[1:] + values[:-1]) / 2
    around = [middles * (1 + by) for by in (-1e-3, -2e-6, -2e-7, 0.0, 2e-7, 2e-6, 1e-3)]
    size = 10 ** (-8 * torch.rand(4096, device=device).double())
    x = torch.cat((*around, size, -size if signed else size, torch.rand_like(size))).float()
    codes, decoded = encoded(x, signed)
    assert codes.min() >= 0 and codes.max() <= 255
    negative = x < 0
    assert (codes[negative] < 127).all()
    x, away = x.double(), (x.double() - values[codes.long()]).abs()
    distances = (x[:, None] - values).abs()
    distances[negative] += values.eq(0) * 9.0  # to zero a negative value never goes
    assert (away <= distances.amin(1) + 1e-6 * x.abs()).all()
    assert ((decoded - x).abs() <= away + 1e-6 * x.abs()).all()


@either
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_it_is_as_near_as_bitsandbytes_own_quantization(device, signed):
    x = torch.rand(16 * BLOCK, device=device) ** 4
    x = (x * torch.randn_like(x).sign() if signed else x).clamp(min=table(signed, device)[0].item())
    x[::BLOCK] = 1.0  # the largest of each block, so that nothing is scaled
    codes, state = bitsandbytes.functional.quantize_blockwise(x, code=table(signed, device), blocksize=BLOCK)
    theirs = bitsandbytes.functional.dequantize_blockwise(codes, state)
    assert ((encoded(x, signed)[1] - x).abs() <= (theirs - x).abs() + 1e-6).all()


# 2. A step


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """The same values between two guards: NaN, or 255."""
    poison = float("nan") if tensor.is_floating_point() else 255
    buffer = tensor.new_full((tensor.numel() + 2 * GUARD,), poison)
    inside = buffer[GUARD:-GUARD].view(tensor.shape)
    return inside.copy_(tensor)


def assert_guards_hold(inside: torch.Tensor) -> None:
    whole = torch.empty(0, dtype=inside.dtype, device=inside.device).set_(inside.untyped_storage())
    assert whole.numel() == inside.numel() + 2 * GUARD
    ends = torch.cat((whole[:GUARD], whole[-GUARD:]))
    assert (ends.isnan() if ends.is_floating_point() else ends == 255).all()


def drawn(size: int, device: str, dtype: torch.dtype) -> torch.Tensor:
    """Of many magnitudes, and in the first block all zero, as are gradients of adapters whose other half is zero."""
    values = torch.randn(size, device=device) * 10 ** (4 * torch.rand(size, device=device) - 4)
    values[:BLOCK] = 0.0
    return values.to(dtype)


def prepared(p: torch.Tensor, **settings) -> tuple[torch.nn.Parameter, optim.AdamW8bit]:
    """A parameter and an optimizer that has states for it, of any size."""
    p = torch.nn.Parameter(p)
    optimizer = optim.AdamW8bit([p], **SETTINGS, **{"weight_decay": 0.0, "min_8bit_size": 1, **settings})
    optimizer.init_state(optimizer.param_groups[0], p, 0, 0)
    return p, optimizer


def copied(state: dict) -> dict:
    return {name: torch.as_tensor(value).clone() for name, value in state.items()}


def decoded(state: dict, i: int) -> torch.Tensor:
    values = state[f"qmap{i}"].double()[state[f"state{i}"].flatten().long()]
    return values * state[f"absmax{i}"].double().repeat_interleave(BLOCK)[: values.numel()]


def adam(before: dict, p: torch.Tensor, grad: torch.Tensor, weight_decay: float) -> tuple[torch.Tensor, ...]:
    """Adam in fp64, from states as they were: what is added to ``p``, and both moments."""
    (beta1, beta2), step = SETTINGS["betas"], before["step"] + 1
    p, grad = p.flatten().double(), grad.flatten().double()
    first = decoded(before, 1) * beta1 + (1 - beta1) * grad
    second = decoded(before, 2) * beta2 + (1 - beta2) * grad**2
    update = first / (1 - beta1**step) / ((second / (1 - beta2**step)).sqrt() + SETTINGS["eps"])
    return -SETTINGS["lr"] * (update + weight_decay * p), first, second


def assert_moment(state: dict, i: int, moment: torch.Tensor) -> None:
    """In blocks' largest: as near as fp32 has 1 - 0.999. In values: as near as any in the table."""
    blocks = torch.nn.functional.pad(moment, (0, -moment.numel() % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(1)
    torch.testing.assert_close(state[f"absmax{i}"].double(), largest, rtol=2e-5, atol=0.0)
    scale = largest.repeat_interleave(BLOCK)[: moment.numel()]
    live = scale > 0
    x, qmap = moment[live] / scale[live], state[f"qmap{i}"].double()
    away = (x - qmap[state[f"state{i}"].flatten().long()[live]]).abs()
    nearest = (x[:, None] - qmap).abs().amin(1)
    # A negative first moment becomes no zero; and rounding's 2e-5 may take another value, no nearer by more than that.
    assert (away <= nearest + 4e-5 * x.abs() + (1e-6 if i == 1 else 0.0)).all()
    assert i == 2 or (qmap[state["state1"].flatten().long()[live]][x < 0] < 0).all()


def assert_parameter(
    p: torch.Tensor, before: torch.Tensor, change: torch.Tensor, other: torch.Tensor, roundings: float
):
    """``p`` is ``other`` within 1e-3 of what was added: 1 - beta2**step, 1e-3 at first, is a difference of numbers near
    1, which bitsandbytes' kernel has from a power in fp32 that is off by 4e-7. And within roundings to p's dtype, each
    half the distance of numbers as large as p was or became."""
    before, after, kind = before.flatten().double(), p.flatten().double(), torch.finfo(p.dtype)
    room = roundings * kind.eps / 2 * torch.maximum(before.abs(), after.abs()) + kind.tiny * kind.eps
    fp32 = 4 * torch.finfo(torch.float32).eps * before.abs()  # sums and weight decay before that
    far = (after - other.flatten().double()).abs() - (1e-3 * change.abs() + room + fp32)
    assert (far <= 0).all(), f"{far.max()} more than allowed, where p was {before[far.argmax()]}"


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("size", [BLOCK, *SIZES])
@either
def test_each_step_is_adams_and_writes_nothing_else(device, dtype, size, weight_decay, steps):
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter has no bf16")
    p, optimizer = prepared(guarded(drawn(size, device, dtype)), weight_decay=weight_decay)
    state = optimizer.state[p]
    state.update({name: guarded(state[name]) for name in PARTS})
    for _ in range(3):
        p.grad = guarded(drawn(size, device, dtype))
        before, states_before = p.detach().clone(), copied(state)
        change, *moments = adam(states_before, before, p.grad, weight_decay)
        optimizer.step()
        assert_parameter(p.detach(), before, change, before.double() + change, roundings=1)
        for i in (1, 2):
            assert_moment(state, i, moments[i - 1])
    assert steps == [size] * 3 and state["step"] == 3
    for each in (p.detach(), p.grad, *(state[name] for name in PARTS)):
        assert_guards_hold(each)


@either
def test_a_block_of_zeros_stays_one(device):
    p, optimizer = prepared(torch.ones(2 * BLOCK, device=device))
    p.grad = torch.zeros_like(p)
    p.grad[BLOCK:] = 1.0
    for _ in range(2):
        optimizer.step()
    state = optimizer.state[p]
    assert (p[:BLOCK] == 1).all() and (p[BLOCK:] < 1).all()
    assert (state["state1"][:BLOCK] == 127).all() and (state["state2"][:BLOCK] == 0).all()
    assert state["absmax1"][0] == 0 and state["absmax2"][0] == 0


@either
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_an_element_without_a_finite_gradient_is_passed_over(device, value):
    """And changes nothing for the others of its block."""
    here, p_at_first = 3, torch.ones(2 * BLOCK, device=device)
    (p, optimizer), (other, twin) = (prepared(p_at_first.clone(), weight_decay=0.1) for _ in range(2))
    p.grad = torch.randn_like(p)
    other.grad = p.grad.clone()
    optimizer.step(), twin.step()
    kept = p[here].item()
    p.grad[here], other.grad[here] = value, 0.0
    optimizer.step(), twin.step()
    state, states = optimizer.state[p], twin.state[other]
    elsewhere = torch.arange(p.numel(), device=device) != here
    assert p[here] == kept and torch.equal(p[elsewhere], other[elsewhere])
    assert state["state1"][here] == 127 and state["state2"][here] == 0
    assert state["absmax1"].isfinite().all() and state["absmax2"].isfinite().all()
    assert torch.equal(state["state1"][BLOCK:], states["state1"][BLOCK:])


# 3. Beside bitsandbytes


def pair(size: int, device: str, dtype: torch.dtype, weight_decay: float) -> tuple[list, list]:
    """Ours and theirs: equal parameters, and their optimizers."""
    ours = torch.nn.Parameter(drawn(size, device, dtype))
    theirs = copy.deepcopy(ours)
    kinds = optim.AdamW8bit, bitsandbytes.optim.AdamW8bit
    return [ours, theirs], [kind([p], **SETTINGS, weight_decay=weight_decay) for kind, p in zip(kinds, (ours, theirs))]


def step_both(parameters: list, optimizers: list, weight_decay: float) -> None:
    """From equal parameters and states: with the same gradient, and parameters then compared."""
    (ours, theirs), before = parameters, parameters[0].detach().clone()
    ours.grad = drawn(ours.numel(), ours.device, ours.dtype)
    theirs.grad = ours.grad.clone()
    state = optimizers[1].state[theirs]
    change = adam(copied(state), before, ours.grad, weight_decay)[0] if state else SETTINGS["lr"]
    for optimizer in optimizers:
        optimizer.step()
    change = torch.as_tensor(change)
    assert_parameter(ours.detach(), before, change, theirs.detach(), roundings=3)  # one is ours, and two may be theirs


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("size", SIZES)
@either
def test_a_step_is_that_of_bitsandbytes(device, dtype, size, weight_decay, steps):
    """From the same states, at every one of 20 steps: then what one step may round otherwise does not add up."""
    if device == "cpu" and dtype != torch.float32:
        pytest.skip("bitsandbytes' own on a CPU rounds more than once")
    parameters, optimizers = pair(size, device, dtype, weight_decay)
    count = 20 if device == "cuda" else 3
    for _ in range(count):
        step_both(parameters, optimizers, weight_decay)
        a, b = (optimizer.state[p] for optimizer, p in zip(optimizers, parameters))
        assert a.keys() == b.keys() and a["step"] == b["step"]
        for i in (1, 2):
            torch.testing.assert_close(a[f"absmax{i}"], b[f"absmax{i}"], rtol=2e-5, atol=0.0)
            if device == "cpu":
                continue  # bitsandbytes' own is coarser near zero there than its table
            live = a[f"absmax{i}"].repeat_interleave(BLOCK)[:size] > 0  # zero times any code is zero
            assert ((a[f"state{i}"].int() - b[f"state{i}"].int()).abs()[live] <= 1).all()
        optimizers[0].load_state_dict(optimizers[1].state_dict())
        parameters[0].data.copy_(parameters[1])
    assert steps == [size] * count


@either
def test_bitsandbytes_goes_on_from_a_state_that_ours_saved(device):
    parameters, optimizers = pair(SIZES[1], device, torch.float32, 0.0)
    for _ in range(3):
        parameters[0].grad = drawn(SIZES[1], device, torch.float32)
        optimizers[0].step()
    parameters[1].data.copy_(parameters[0])
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    step_both(parameters, optimizers, 0.0)
    assert [optimizer.state[p]["step"] for optimizer, p in zip(optimizers, parameters)] == [4, 4]


# 4. What goes to the kernel


@either
def test_tables_are_compared_once_and_others_go_to_bitsandbytes(device, steps, monkeypatch):
    compared, equal = [], torch.equal
    p, optimizer = prepared(drawn(4096, device, torch.float32))
    p.grad = drawn(4096, device, torch.float32)
    monkeypatch.setattr(torch, "equal", lambda *both: compared.append(both) or equal(*both))
    for _ in range(3):
        optimizer.step()
    assert len(compared) == 2 and len(steps) == 3
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    optimizer.step()
    assert len(compared) == 4 and len(steps) == 5
    optimizer.state[p]["qmap1"] = optimizer.state[p]["qmap1"] * 0.5
    optimizer.step()
    assert len(steps) == 5 and optimizer.state[p]["step"] == 6


@either
def test_what_is_not_contiguous_is_left_to_bitsandbytes_which_makes_it_so(device, steps):
    p, optimizer = prepared(drawn(64 * 128, device, torch.float32).view(64, 128).T)
    before = p.detach().clone()
    for _ in range(2):
        p.grad = torch.ones(128, 64, device=device)
        optimizer.step()
    assert steps == [64 * 128] and p.is_contiguous()
    torch.testing.assert_close(p.detach(), before - 2 * SETTINGS["lr"], rtol=0.0, atol=1e-5)


@either
def test_settings_of_one_weight_and_of_a_group_hold(device, monkeypatch):
    monkeypatch.setattr(bitsandbytes.optim.GlobalOptimManager.get_instance(), "pid2config", {})
    parameters = [torch.nn.Parameter(torch.ones(4096, device=device)) for _ in range(3)]
    groups = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.25}]
    optimizer = optim.AdamW8bit(groups, lr=0.5, weight_decay=0.0)
    optimizer.mng.pid2config[id(parameters[1])] = {"lr": 0.125}
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for p, lr in zip(parameters, (0.5, 0.125, 0.25)):
        torch.testing.assert_close(p.detach(), torch.full_like(p, 1 - lr), rtol=0.0, atol=1e-3)


@pytest.mark.gpu
def test_one_kernel_is_compiled_whatever_the_size_the_step_and_the_settings():
    kernels = adam_kernel._adam_kernel.device_caches[torch.cuda.current_device()][0]
    before = None
    for step in range(1, 10):
        p, optimizer = prepared(drawn(4096 * step, "cuda", torch.bfloat16), weight_decay=0.1 / step)
        p.grad = torch.randn_like(p)
        optimizer.param_groups[0].update(lr=1e-3 / step, betas=(1 - 0.1 / step, 1 - 0.01 / step))
        for _ in range(2):
            optimizer.step()
        before = before or len(kernels)
    assert len(kernels) == before


@pytest.mark.gpu
def test_a_kernel_is_launched_again_only_where_triton_would_take_it(monkeypatch):
    """With sizes, types and addresses of all kinds: kept over all of them, and forgotten before each."""
    kept, fresh = {}, {}
    bf16, fp16 = torch.bfloat16, torch.float16
    cases = [(4096, bf16, ""), (8192, bf16, ""), (4097, bf16, ""), (1, bf16, ""), (4096, fp16, "")]
    for size, dtype, odd in [*cases, (4096, bf16, "p"), (4096, bf16, "grad"), *((4096, bf16, part) for part in PARTS)]:
        p, optimizer = prepared(drawn(size, "cuda", dtype))
        p.grad = torch.randn_like(p)
        if odd in PARTS:
            optimizer.state[p][odd] = guarded(optimizer.state[p][odd])
        elif odd:
            (p if odd == "p" else p.grad).data = guarded((p if odd == "p" else p.grad).data)
        for into in (kept, {}):
            monkeypatch.setattr(adam_kernel, "_compiled", into)
            optimizer.step()
        ((key, kernel),) = into.items()
        assert kept[key] is kernel
        fresh[key] = kernel
    assert kept == fresh and len(set(map(id, kept.values()))) == len(kept) == 10
