"""Reads machine code of Hopper for a race that Triton 3.6 leaves in it (triton-lang/triton#9433).

HGMMA runs on while the warp goes ahead. Its right operand lies in shared memory; its left one may lie in registers, and
until a WARPGROUP.DEPBAR says that the product is done, whoever writes to these registers changes what is multiplied.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import triton

OPERAND_REGISTERS = 4  # of a thread's share of a 64 x 16 operand
NO_RESULT = ("ST", "BAR", "BRA", "WARPGROUP", "DEPBAR", "LDGSTS", "LDGDEPBAR", "HGMMA", "ISETP", "UISETP", "NOP")


def tool(name: str, *arguments: str, cubin: bytes) -> str:
    """What one of the CUDA tools that come with Triton says about a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [Path(triton.__file__).parent / "backends/nvidia/bin" / name, *arguments, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def register_hazards(cubin: bytes) -> tuple[int, list[str]]:
    """How many products of all loops have a register operand, and the instructions that overwrite one too early."""
    products, early = 0, []
    for body in loops(tool("nvdisasm", "-c", cubin=cubin)):
        for at, instruction in enumerate(body):
            operand = re.match(r"HGMMA\.\S+ R\d+, R(\d+), gdesc", instruction)
            if operand:
                products += 1
                first = int(operand[1])
                early += first_overwrite(body, at, set(range(first, first + OPERAND_REGISTERS)))
    return products, early


def loops(listing: str) -> list[list[str]]:
    """The instructions of each innermost loop that multiplies, from its label to the branch back."""
    labels, instructions, found = {}, [], []
    for line in listing.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        instruction = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line)
        if label:
            labels[label[1]] = len(instructions)
        elif instruction:
            instructions.append(instruction[1])
    for at, instruction in enumerate(instructions):
        target = re.search(r"BRA.*?(\.L_x_\d+)", instruction)
        if target and labels.get(target[1], at + 1) <= at:
            body = instructions[labels[target[1]] : at + 1]
            if any("HGMMA" in one for one in body):
                found.append(body)
    return found


def first_overwrite(body: list[str], at: int, registers: set[int]) -> list[str]:
    """The first write to the registers of the product at ``at``, going round the loop, unless it is waited for first.

    Products end in groups, closed by "gsb0" in turn; DEPBAR.LE gsb0, n waits until at most n of them are open.
    """
    later, closed = 0, "gsb0" in body[at]
    for step in range(1, 2 * len(body)):
        instruction = body[(at + step) % len(body)]
        if instruction.startswith("HGMMA") and "gsb0" in instruction:
            later, closed = later + closed, True
        wait = re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\w+)", instruction)
        if wait and closed and later >= int(wait[1], 16):
            return []
        if registers & written(instruction):
            return [instruction]
    return []


def written(instruction: str) -> set[int]:
    """The registers an instruction writes."""
    name, _, operands = re.sub(r"^@!?U?P\w+\s+", "", instruction).partition(" ")
    target = re.match(r"\s*R(\d+)", operands)
    if name.startswith(NO_RESULT) or not target:
        return set()
    count = 4 if ".128" in name else 2 if ".64" in name or "WIDE" in name else 1
    return set(range(int(target[1]), int(target[1]) + count))
