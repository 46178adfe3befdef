"""Machine code as ``cuobjdump -sass`` prints it: the main loop of a kernel, and what it costs.

    instructions per element = instructions of the main loop / elements that one turn of it moves

The main loop is the innermost loop that moves most bytes; of a kernel without one, all of it. A
turn with eight loads of 16 bytes (LDG.E.128), at 2 bytes per element, takes 64 elements of a
thread. With 512 instructions that is 8 per element. That elements follow from bytes makes it the
same figure for a loop that the assembler unrolled.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# An address, perhaps a predicate, the opcode with its suffixes, and the operands.
LINE = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", re.MULTILINE
)
DOUBLE = re.compile(r"D(?:ADD|MUL|FMA|SETP|MNMX)\b|.*(?:\.F64|64H)")
WIDE_BYTES = 16


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str  # LDG.E.128
    operands: str

    @property
    def wide_bytes(self) -> int:
        """Bytes of a wide access to global memory, as those to masks and scalars are not."""
        moves = self.opcode.startswith(("LDG.", "STG.")) and ".128" in self.opcode
        return WIDE_BYTES if moves else 0

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"\b0x([0-9a-f]+)$", self.operands)
        return int(found[1], 16) if self.opcode.startswith("BRA") and found else None


@dataclass(frozen=True)
class Cost:
    """What one turn of a main loop costs a thread."""

    instructions: int
    doubles: int  # in float64, conversions included
    calls: int
    wide_bytes: int

    def elements(self, bytes_per_element: float) -> float:
        """Elements of a turn, of which each is so many bytes of wide accesses."""
        found = self.wide_bytes / bytes_per_element
        if not found or found % 1:
            raise ValueError(
                f"a turn of the main loop moves {self.wide_bytes} bytes by wide accesses, no whole "
                f"number of elements of {bytes_per_element:g} bytes: count what the loop reads and "
                "writes for one element, factors that lie in a cache included"
            )
        return found

    def per_element(self, bytes_per_element: float, elements: int | None = None) -> float:
        """Instructions per element; ``elements`` of a turn, where no access is wide."""
        return self.instructions / (elements or self.elements(bytes_per_element))


def kernels(text: str) -> dict[str, list[Instruction]]:
    """The instructions of every kernel of a disassembly, by its (mangled) name."""
    return {
        part.split(maxsplit=1)[0]: [
            Instruction(int(m[1], 16), m[2], m[3]) for m in LINE.finditer(part)
        ]
        for part in text.split("Function : ")[1:]
    }


def main_loop(kernel: list[Instruction]) -> list[Instruction]:
    """The innermost loop that moves most bytes; all up to the last exit, where there is none."""
    loops = []
    for i, each in enumerate(kernel):
        start = each.target
        if start is not None and start < each.address:
            loops.append([k for k in kernel[:i] if k.address >= start] + [each])
    spans = [(loop[0].address, loop[-1].address) for loop in loops]
    inner = [
        loop
        for loop, (a, b) in zip(loops, spans, strict=True)
        if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in spans)
    ]
    moving = [loop for loop in inner if any("LDG" in k.opcode for k in loop)]
    if moving:
        return max(moving, key=lambda loop: (sum(k.wide_bytes for k in loop), len(loop)))
    last = max(i for i, k in enumerate(kernel) if k.opcode == "EXIT")
    return kernel[: last + 1]


def cost(kernel: list[Instruction]) -> Cost:
    loop = main_loop(kernel)
    return Cost(
        len(loop),
        sum(DOUBLE.match(k.opcode) is not None for k in loop),
        sum(k.opcode.startswith("CALL") for k in loop),
        sum(k.wide_bytes for k in loop),
    )
