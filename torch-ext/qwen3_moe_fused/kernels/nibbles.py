"""Looking 4-bit codes up in PTX: the assembly that ``four_bit_fast`` and ``dequantize`` put into their kernels.

A nibble stands for one of sixteen numbers. GPUs have an instruction, PRMT, that picks four bytes out of eight by four
3-bit indices. Two of them look four nibbles' low three bits up in both halves of a table of sixteen bytes, and a third
picks between the halves by their top bits. A number of two bytes takes two such tables, an fp32 number four, and PRMT
again puts the bytes of each number together. Eight weights take 21 instructions in 16 bits, 2.5 times faster than a
tree of selects (measured inside the product on an H200).

The functions return text for ``tl.inline_asm_elementwise``: results are $0, $1, .., inputs follow.
"""

import functools
from typing import List, Sequence, Tuple

import torch

_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4 = tuple(sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3))
CODES = {"nf4": _NF4, "fp4": _FP4}
FACTORS = {"nf4": 1.4365, "fp4": 1.5}
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def table_words(quant_type: str, dtype: str) -> List[int]:
    """The codebook as tables of sixteen bytes, four words each: all numbers' lowest bytes first. In 16 bits it is
    multiplied by its FACTOR."""
    code = torch.tensor(CODES[quant_type], dtype=torch.float64)
    if dtype != "fp32":
        code *= FACTORS[quant_type]
    code = code.to(_DTYPES[dtype])
    planes = code.view(torch.uint8).view(16, code.itemsize).t()
    return [int.from_bytes(bytes(word.tolist()), "little") for plane in planes for word in plane.view(4, 4)]


@functools.cache
def even_words(quant_type: str, dtype: str) -> Tuple[int, ...]:
    """The words 0, 2, 4 and 6 of the table, as int32: those that the assembly takes in registers."""
    return tuple(word - (word >> 31 << 32) for word in table_words(quant_type, dtype)[0::2])


class _Assembly:
    """Lines of PTX. ``table`` are the operands that hold the words of ``table_words``."""

    def __init__(self, table: Sequence[str]):
        self.planes = [table[i : i + 4] for i in range(0, len(table), 4)]
        self.lines = [".reg .b32 x, m, s, a, b, z, p<4>, t<2>"]

    def select(self, word: str) -> None:
        """m: the low three bits of the word's eight nibbles, the indices into half a table. s: for each 0x3210 in turn,
        which takes a byte from the first half's result, with 4 added where the top bit wants the second half's."""
        self.lines += [f"and.b32 m, {word}, 0x77777777", f"shr.u32 s, {word}, 1"]
        self.lines += ["lop3.b32 s, s, 0x44444444, 0x32103210, 0xEA"]

    def look_up(self) -> None:
        """p0, p1, ..: the lowest, next, .. bytes of the four lowest nibbles' numbers; then moves on to the others."""
        for plane, (w0, w1, w2, w3) in enumerate(self.planes):
            self.lines += [f"prmt.b32 a, {w0}, {w1}, m", f"prmt.b32 b, {w2}, {w3}, m", f"prmt.b32 p{plane}, a, b, s"]
        self.lines += ["shr.u32 m, m, 16", "shr.u32 s, s, 16"]

    def scale(self, results: int, pair: str, scales: str, wait: bool = False) -> None:
        """$0, $1, ..: w0, w1, .. times their scales. Adding -0.0 makes it a product, an instruction that sm_80 lacks
        for bf16. With ``wait`` none is written before Hopper's products in flight have read what it held."""
        self.lines = [f".reg .b32 w<{results}>", *self.lines, *["wgmma.wait_group.sync.aligned 0"] * wait]
        self.lines += ["mov.b32 z, 0x80008000"]
        self.lines += [f"fma.rn.{pair} ${i}, w{i}, {scales}, z" for i in range(results)]

    def __str__(self) -> str:
        return "{\n" + "".join(f"{line};\n" for line in self.lines) + "}"


def _half_in_registers(quant_type: str, dtype: str, first: int) -> List[str]:
    """The table's even words in the operands from ``first`` on. PRMT takes one constant, so the odd words are written
    into the instructions."""
    table = [f"0x{word:08x}" for word in table_words(quant_type, dtype)]
    table[0::2] = [f"${first + i}" for i in range(4)]
    return table


_PAIRS = {"bf16": "bf16x2", "fp16": "f16x2"}


@functools.cache
def decode_row(quant_type: str, dtype: str) -> str:
    """The word $4, eight nibbles along k -> $0..$3, pairs {k, k + 1}, times $5; $6..$9 even words of the table.

    The even weight is in the high nibble, so the planes hold weights 1, 0, 3, 2 of four.
    """
    assembly = _Assembly(_half_in_registers(quant_type, dtype, 6))
    assembly.select("$4")
    for half in (0, 2):
        assembly.look_up()
        assembly.lines += [f"prmt.b32 w{half}, p0, p1, 0x4051", f"prmt.b32 w{half + 1}, p0, p1, 0x6273"]
    assembly.scale(4, _PAIRS[dtype], "$5")
    return str(assembly)


@functools.cache
def decode_two_rows(quant_type: str, dtype: str, bits: int, wait: bool) -> str:
    """Words of ``bits`` bits of rows n and n + 1, nibbles along k -> pairs {w[n, k], w[n + 1, k]}, one a result, times
    the pair of their scales; inputs are the two words, that pair and the table's even words.

    The rows' bytes are interleaved first, so that one lookup serves both. ``wait`` as in ``scale``.
    """
    results = bits // 4
    first, second, scales = (f"${results + i}" for i in range(3))
    assembly = _Assembly(_half_in_registers(quant_type, dtype, results + 3))
    for i in range(0, results, 2):
        if i % 4 == 0:
            assembly.lines += [f"prmt.b32 x, {first}, {second}, {('0x5140', '0x7362')[i // 4]}"]
            assembly.select("x")
        assembly.look_up()
        assembly.lines += [f"prmt.b32 w{i}, p0, p1, 0x7351", f"prmt.b32 w{i + 1}, p0, p1, 0x6240"]
    assembly.scale(results, _PAIRS[dtype], scales, wait)
    return str(assembly)


@functools.cache
def decode_exact(quant_type: str) -> str:
    """The word $8, eight nibbles along k -> $0..$7, their fp32 numbers in order, bit for bit those of the codebook."""
    assembly = _Assembly([f"0x{word:08x}" for word in table_words(quant_type, "fp32")])
    assembly.select("$8")
    for half in (0, 4):
        assembly.look_up()
        for first, order in ((half, "0x5140"), (half + 2, "0x7362")):
            assembly.lines += [f"prmt.b32 t0, p0, p1, {order}", f"prmt.b32 t1, p2, p3, {order}"]
            assembly.lines += [f"prmt.b32 ${first + 1}, t0, t1, 0x5410", f"prmt.b32 ${first}, t0, t1, 0x7632"]
    return str(assembly)
