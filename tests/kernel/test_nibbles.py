"""The assembly that looks nibbles up, run by an emulator of the six instructions it is made of."""

import importlib
import random

import pytest
import torch
from bitsandbytes.functional import get_4bit_type

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
CASES = [(quant_type, dtype) for quant_type in ("nf4", "fp4") for dtype in DTYPES]
ONE = {"bf16": 0x3F803F80, "fp16": 0x3C003C00}  # the pair {1.0, 1.0}


@pytest.fixture(scope="module")
def nibbles(kernel):
    return importlib.import_module(f"{kernel.__name__}.kernels.nibbles")


def emulate(text: str, results: int, inputs: list, pair: torch.dtype = torch.bfloat16) -> list[int]:
    """The 32-bit words $0, $1, .. that the assembly leaves."""
    registers = {f"${results + i}": word for i, word in enumerate(inputs)}

    def value(operand: str) -> int:
        return int(operand, 16) if operand.startswith("0x") else registers.get(operand) or int(registers[operand])

    def prmt(a: str, b: str, selector: str) -> int:
        octets = value(a).to_bytes(4, "little") + value(b).to_bytes(4, "little")
        chosen = value(selector)
        assert not chosen & 0x8888, "the top bit of a selector repeats a sign"
        return int.from_bytes(bytes(octets[chosen >> 4 * i & 7] for i in range(4)), "little")

    def fma(a: str, b: str, c: str) -> int:
        a, b, c = (torch.tensor([value(x) - (value(x) >> 31 << 32)], dtype=torch.int32).view(pair) for x in (a, b, c))
        return (a.double() * b.double() + c.double()).to(pair).view(torch.int32).item() & 0xFFFFFFFF

    operations = {
        "and.b32": lambda a, b: value(a) & value(b),
        "shr.u32": lambda a, b: value(a) >> int(b),
        "mov.b32": value,
        "lop3.b32": lambda a, b, c, table: (value(a) & value(b)) | value(c) if table == "0xEA" else None,
        "prmt.b32": prmt,
        "fma.rn.bf16x2": fma,
        "fma.rn.f16x2": fma,
    }
    for line in text.strip("{};\n").split(";\n"):
        name, _, operands = line.partition(" ")
        if name and name != ".reg":
            to, *operands = operands.split(", ")
            registers[to] = operations[name](*operands)
    return [registers[f"${i}"] for i in range(results)]


def words(count: int = 200) -> list[int]:
    """Words that together have every nibble at every place, and random ones."""
    return [digit * 0x11111111 for digit in range(16)] + [random.getrandbits(32) for _ in range(count)]


def nibble(word: int, k: int) -> int:
    """The k-th weight of a word: of each byte the high half comes first."""
    return word >> 8 * (k // 2) + (0 if k % 2 else 4) & 15


def bits_of(nibbles, quant_type: str, dtype: str) -> list[int]:
    """Each nibble's 16 bits by bitsandbytes' own codebook."""
    code = get_4bit_type(quant_type, device="cpu").double() * nibbles.FACTORS[quant_type]
    return [number & 0xFFFF for number in code.to(DTYPES[dtype]).view(torch.int16).tolist()]


def close_zero(word: int) -> int:
    """-0.0 as 0.0, in both halves."""
    return (word & 0xFFFF if word & 0x7FFF else 0) | (word & 0xFFFF0000 if word & 0x7FFF0000 else 0)


@pytest.mark.parametrize(("quant_type", "dtype"), CASES)
def test_a_row_gives_its_eight_weights_in_order(nibbles, quant_type, dtype):
    table, bits = nibbles.table_words(quant_type, dtype)[0::2], bits_of(nibbles, quant_type, dtype)
    text = nibbles.decode_row(quant_type, dtype)
    for word in words():
        got = emulate(text, 4, [word, ONE[dtype], *table], DTYPES[dtype])
        want = [bits[nibble(word, 2 * i)] | bits[nibble(word, 2 * i + 1)] << 16 for i in range(4)]
        assert [close_zero(x) for x in got] == [close_zero(x) for x in want], hex(word)


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize(("quant_type", "dtype"), CASES)
def test_two_rows_give_their_weights_in_pairs(nibbles, quant_type, dtype, size):
    table, bits = nibbles.table_words(quant_type, dtype)[0::2], bits_of(nibbles, quant_type, dtype)
    text = nibbles.decode_two_rows(quant_type, dtype, size, False)
    for first, second in zip(words(), reversed(words())):
        got = emulate(text, size // 4, [first, second, ONE[dtype], *table], DTYPES[dtype])
        want = [bits[nibble(first, k)] | bits[nibble(second, k)] << 16 for k in range(size // 4)]
        assert [close_zero(x) for x in got] == [close_zero(x) for x in want], (hex(first), hex(second))


@pytest.mark.parametrize("size", [16, 32])
def test_it_may_wait_after_the_last_lookup_and_before_it_writes_any_result(nibbles, size):
    wait = "wgmma.wait_group.sync.aligned 0"
    waiting, other = (nibbles.decode_two_rows("nf4", "bf16", size, wait).split(";\n") for wait in (True, False))
    assert [line for line in waiting if line != wait] == other and wait not in other
    at = waiting.index(wait)
    assert not any(line.startswith("prmt") for line in waiting[at:])
    assert sum(line.split(",")[0].split()[-1].startswith("$") for line in waiting[at:]) == size // 4
    assert not any(line.split(",")[0].split()[-1].startswith("$") for line in waiting[:at])


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_exact_codes_are_those_of_the_codebook_bit_for_bit(nibbles, quant_type):
    code = get_4bit_type(quant_type, device="cpu")
    for word in words():
        got = torch.tensor(emulate(nibbles.decode_exact(quant_type), 8, [word])).to(torch.uint32).view(torch.float32)
        want = code[[nibble(word, k) for k in range(8)]]
        assert torch.equal(got.view(torch.int32), want.view(torch.int32)), hex(word)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_scale_leaves_only_the_rounding_of_the_result(nibbles, dtype):
    """Half a unit in the last place."""
    table, kind = nibbles.table_words("nf4", dtype)[0::2], DTYPES[dtype]
    code = torch.tensor(bits_of(nibbles, "nf4", dtype), dtype=torch.int32).to(torch.uint16).view(kind).double()
    for scale in (torch.rand(50) + 0.1).to(kind):
        pair = torch.stack((scale, scale)).view(torch.int32).item() & 0xFFFFFFFF
        got = emulate(nibbles.decode_row("nf4", dtype), 4, [0x89ABCDEF, pair, *table], kind)
        got = torch.tensor(got).to(torch.uint32).view(kind).double()
        want = code[[nibble(0x89ABCDEF, k) for k in range(8)]] * scale.double()
        assert ((got - want).abs() <= 0.5 * torch.finfo(kind).eps * want.abs()).all()


@pytest.mark.parametrize("size", [16, 32])
def test_each_row_of_two_has_its_own_scale(nibbles, size):
    table, bits = nibbles.table_words("nf4", "bf16")[0::2], bits_of(nibbles, "nf4", "bf16")
    text = nibbles.decode_two_rows("nf4", "bf16", size, False)
    one_and_two = 0x4000_3F80  # {1.0, 2.0}
    for first, second in zip(words(), reversed(words())):
        got = emulate(text, size // 4, [first, second, one_and_two, *table])
        low, high = ([bits[nibble(word, k)] for k in range(size // 4)] for word in (first, second))
        doubled = [word + 0x80 if word & 0x7FFF else word for word in high]  # the next exponent
        want = [a | b << 16 for a, b in zip(low, doubled)]
        assert [close_zero(x) for x in got] == [close_zero(x) for x in want], (hex(first), hex(second))


def test_the_factor_halves_the_rounding_of_nf4_in_bf16(nibbles):
    """Weighted by how often a normal weight meets each code: without it, 1.4e-3."""
    code = get_4bit_type("nf4", device="cpu").double()
    drawn = torch.randn(1000, 64).double()
    nearest = ((drawn / drawn.abs().amax(1, keepdim=True)).unsqueeze(-1) - code).abs().argmin(-1)
    rounded = (code * nibbles.FACTORS["nf4"]).bfloat16().double() / nibbles.FACTORS["nf4"]
    assert (rounded - code)[nearest].norm() < 0.9e-3 * code[nearest].norm()
    fp4 = get_4bit_type("fp4", device="cpu").double() * nibbles.FACTORS["fp4"]
    assert (fp4.bfloat16().double() - fp4).norm() < 1e-6 * fp4.norm()
