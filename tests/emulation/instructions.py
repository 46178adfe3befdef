"""Instructions per element in the main loop of each kernel, counted in its machine code.

    PYTHONPATH=.:tests python -m emulation.instructions [ARCH]

prints the table of docs/cuda.md for bfloat16. Nothing runs, so that it takes no GPU. Example: the
main loop of ``channel_moments_`` has 208 instructions and four loads of 16 bytes, which bring 32
elements: 6.5 instructions an element.

The main loop is the innermost one with the most 16-byte loads, of several the longest (that with
noise, of an update). All its instructions count, also those of a branch that is seldom taken.
"""

from __future__ import annotations

import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from emulation import nvcc
from emulation.build import SOURCES, run, source_of

BYTES = 16  # of a load
LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(\S+)([^;]*);", re.MULTILINE)


@dataclass(frozen=True)
class Measured:
    """What is counted of one kernel: its operator, its template's arguments, and its inputs."""

    op: str
    arguments: str
    inputs: int  # tensors that are read element by element
    limit: float  # instructions an element that it may take
    size: int = 2  # bytes of an element


MEASURED = (
    Measured("channel_moments_", "__nv_bfloat16, 8", 1, 7),
    Measured("gated_moments", "__nv_bfloat16, 8, ssah::Act::kSilu", 2, 20),
    Measured("gated_moments_backward", "__nv_bfloat16, 8, ssah::Act::kSilu", 3, 24),
    Measured("gated_product", "__nv_bfloat16, 8, ssah::Act::kSilu", 2, 9),
    Measured("taylor_moments_", "__nv_bfloat16, 8", 2, 7),
    Measured("column_sq_norms", "__nv_bfloat16, 8", 1, 4),
    Measured("masked_grad_norm", "__nv_bfloat16", 1, 8),
    Measured("masked_adamw_", "__nv_bfloat16, __nv_bfloat16, __nv_bfloat16", 4, 40),
    Measured("masked_adamw_", "float, float, float", 4, 40, size=4),
    Measured("masked_sgd_", "__nv_bfloat16, __nv_bfloat16, __nv_bfloat16, 1", 3, 30),
)


@dataclass(frozen=True)
class Loop:
    """The main loop of a kernel."""

    instructions: int
    elements: int  # of one trip of one thread
    float64: int  # instructions of the float64 units
    calls: int

    @property
    def per_element(self) -> float:
        return self.instructions / self.elements


def kernel_alone(measured: Measured) -> str:
    """A source with the one kernel: its file without host functions, and its address."""
    stem = measured.op.removesuffix("_")
    text = (SOURCES / source_of(measured.op)).read_text()
    kernels = text[: text.rindex("\ntemplate", 0, text.index("\ncudaError_t launch_"))]
    name = f"ssah::{stem}_kernel<{measured.arguments}>"
    return f"{kernels}\n}}\nconst void* const kernel = reinterpret_cast<const void*>(&{name});\n"


def main_loop(code: str, measured: Measured) -> Loop:
    """``code``: what cuobjdump -sass prints of one kernel."""
    lines = [(int(address, 16), name, rest) for address, name, rest in LINE.findall(code)]
    jumps = [
        (int(target[1], 16), address)
        for address, name, rest in lines
        if name.startswith("BRA") and (target := re.search(r"0x([0-9a-f]+)", rest))
    ]
    loops = [
        (start, end) for start, end in jumps if start < end
    ]  # one that waits at the end is none
    innermost = [
        [name for address, name, _ in lines if start <= address <= end]
        for start, end in loops
        if not any(start <= s and e <= end and (s, e) != (start, end) for s, e in loops)
    ]

    def loads(names: list[str]) -> int:
        return sum(name.startswith("LDG.E.128") for name in names)

    names = max(innermost, key=lambda names: (loads(names), len(names)))
    if loads(names) % measured.inputs:
        raise ValueError(f"{measured} has a main loop with {loads(names)} loads of {BYTES} bytes")
    return Loop(
        len(names),
        loads(names) // measured.inputs * BYTES // measured.size,
        sum(bool(re.match(r"D(ADD|FMA|MUL|SETP)|F2F\.F64|F2F\.F32\.F64", name)) for name in names),
        sum(name.startswith("CALL") for name in names),
    )


def measure(measured: Measured, directory: Path, arch: int = 90) -> tuple[nvcc.Kernel, Loop]:
    source = directory / "kernel.cu"
    source.write_text(kernel_alone(measured))
    cubin = source.with_suffix(".cubin")
    name = f"{measured.op.removesuffix('_')}_kernelI"
    kernels = [k for k in nvcc.compiled(source, cubin, arch, SOURCES) if name in k.name]
    if len(kernels) != 1:
        raise ValueError(f"{measured} is {len(kernels)} kernels")
    code = run(nvcc.cuobjdump(), "-sass", "-fun", kernels[0].name, cubin)
    return kernels[0], main_loop(code, measured)


def main() -> None:
    arch = int(sys.argv[1]) if len(sys.argv) > 1 else 90
    print("| operator | instructions | of float64 | calls | registers | spilled bytes |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        for measured in MEASURED:
            kernel, loop = measure(measured, Path(directory), arch)
            name = f"`{measured.op}`" + (", float32" if measured.size == 4 else "")
            print(
                f"| {name} | {loop.per_element:.1f} | {loop.float64 / loop.elements:.1f} | "
                f"{loop.calls} | {kernel.registers} | {kernel.spilled} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
