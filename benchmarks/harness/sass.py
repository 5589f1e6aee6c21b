"""Reads machine code of Hopper for a race that Triton 3.6 leaves in it (triton-lang/triton#9433).

HGMMA runs on while the warp goes ahead. Its right operand lies in shared memory; its left one may lie in registers, and
until a WARPGROUP.DEPBAR says that the product is done, whoever writes to these registers changes what is multiplied.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton

OPERAND_REGISTERS = 4  # of a thread's share of a 64 x 16 operand
MANY_GROUPS = 8  # more than a wait ever leaves open

READS_FIRST = re.compile(r"HGMMA|\w*SETP|FCHK|R2P|BAR|WARPSYNC|NANOSLEEP|RET|CALL|BRX|JMX")
"""Instructions whose first register is no result. HGMMA's is, but products follow one another, and it reads before."""
FOUR_REGISTERS = re.compile(r".*\.128\b|LDSM.*\.4|HMMA.*\.F32|IMMA")
TWO_REGISTERS = re.compile(
    r".*\.64\b|.*\.WIDE|LDSM.*\.2|HMMA|CS2R(?!\.32)|LEPC|D(ADD|MUL|FMA|MNMX)|[IF]2F\.F64|F2I\.[US]64"
)


class Code(NamedTuple):
    """A kernel's instructions, and of each label the instruction that follows it."""

    instructions: list[str]
    labels: dict[str, int]

    @staticmethod
    def of(listing: str) -> Code:
        """``listing`` as nvdisasm prints it."""
        code = Code([], {})
        for line in listing.splitlines():
            label = re.match(r"\s*(\.L_x_\d+):", line)
            instruction = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line)
            if label:
                code.labels[label[1]] = len(code.instructions)
            elif instruction:
                code.instructions.append(instruction[1])
        return code

    def after(self, at: int) -> list[int]:
        """Which instructions may come after that at ``at``. A function that is called counts as one that returns."""
        instruction = self.instructions[at]
        ways = [] if re.match(r"EXIT|RET|BRA `", instruction) else [at + 1]
        branch = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", instruction)
        if branch:
            ways.append(self.labels[branch[1]])
        return [way for way in ways if way < len(self.instructions)]


def tool(name: str, *arguments: str, cubin: bytes) -> str:
    """What one of the CUDA tools that come with Triton says about a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [Path(triton.__file__).parent / "backends/nvidia/bin" / name, *arguments, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def register_hazards(listing: str) -> tuple[int, list[str]]:
    """How many products have a register operand, and the instructions that overwrite one too early."""
    code, products, early = Code.of(listing), 0, []
    for at, instruction in enumerate(code.instructions):
        operand = re.match(r"HGMMA\.\S+ R\d+, R(\d+), gdesc", instruction)
        if operand:
            products += 1
            first = int(operand[1])
            early += early_writes(code, at, set(range(first, first + OPERAND_REGISTERS)))
    return products, early


def early_writes(code: Code, at: int, registers: set[int]) -> list[str]:
    """On each way from the product at ``at`` the first write to its registers, unless the product is waited for first.

    Products end in groups, closed by "gsb0" in turn; DEPBAR.LE gsb0, n waits until at most n of them are open.
    """
    found, seen = [], set()
    ways = [(after, 0, "gsb0" in code.instructions[at]) for after in code.after(at)]
    while ways:
        way = at, later, closed = ways.pop()
        if way in seen:
            continue
        seen.add(way)
        instruction = code.instructions[at]
        if instruction.startswith("HGMMA") and "gsb0" in instruction:
            later, closed = min(later + closed, MANY_GROUPS), True
        wait = re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\w+)", instruction)
        if wait and closed and later >= int(wait[1], 16):
            continue
        if registers & written(instruction):
            found.append(instruction)
            continue
        ways += [(after, later, closed) for after in code.after(at)]
    return found


def written(instruction: str) -> set[int]:
    """The registers an instruction writes."""
    name, _, operands = re.sub(r"^@!?U?P\w+\s+", "", instruction).partition(" ")
    target = re.match(r"\s*(?:U?P[T\d],\s*)*R(\d+)", operands)  # predicates that are results, too, come first
    if READS_FIRST.match(name) or not target:
        return set()
    count = 4 if FOUR_REGISTERS.match(name) else 2 if TWO_REGISTERS.match(name) else 1
    return set(range(int(target[1]), int(target[1]) + count))
