"""What the CUDA kernels cost: ``PYTHONPATH=tests python tests/helpers/cuda_costs.py [ARCH]``.

Prints the table of instructions per element in docs/cuda.md, which is for 90. Nothing runs, so that
it takes no GPU. Example: the main loop of ``channel_moments_`` has 208 instructions and four loads
of 16 bytes, which bring 32 elements: 6.5 instructions an element.

All instructions of the main loop count, also those of a branch that is seldom taken.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from emulation import nvcc
from emulation.build import SOURCES, run, source_of
from sass import Cost, cost, kernels


@dataclass(frozen=True)
class Row:
    """A row of the table: an operator, the arguments of its template, and what it moves."""

    label: str
    op: str
    arguments: str
    bytes: int  # per element, read and written
    before: float  # instructions per element in an earlier release
    limit: float  # instructions per element that it may take
    extra: int = 0  # bytes per element from a cache, by loads as wide as the others

    @property
    def moved(self) -> int:
        """Bytes of wide accesses per element."""
        return self.bytes + self.extra


HALF = "__nv_bfloat16, 8"
SILU = f"{HALF}, ssah::Act::kSilu"
HALVES = ", ".join(["__nv_bfloat16"] * 3)
ROWS = (
    Row("`channel_moments_`", "channel_moments_", HALF, 2, 9.5, 7),
    Row("`gated_moments`, SiLU", "gated_moments", SILU, 6, 29.8, 20),
    Row("`gated_moments_backward`, SiLU", "gated_moments_backward", SILU, 10, 33.1, 24),
    Row("`gated_product`, SiLU", "gated_product", SILU, 6, 26.2, 18, extra=4),
    Row("`taylor_moments_`", "taylor_moments_", HALF, 4, 8.8, 7),
    Row("`column_sq_norms`", "column_sq_norms", HALF, 2, 4.3, 4),
    Row("`masked_grad_norm`", "masked_grad_norm", "__nv_bfloat16", 2, 8, 8),
    Row("`masked_adamw_`, with noise", "masked_adamw_", HALVES, 14, 82, 40),
    Row("`masked_adamw_`, float32", "masked_adamw_", "float, float, float", 28, 62, 40),
    Row("`masked_sgd_`, with noise", "masked_sgd_", f"{HALVES}, 1", 10, 113, 30),
)


def kernel_alone(row: Row) -> str:
    """A source with the one kernel: its file without host functions, and its address."""
    stem = row.op.removesuffix("_")
    text = (SOURCES / source_of(row.op)).read_text()
    above = text[: text.rindex("\ntemplate", 0, text.index("\ncudaError_t launch_"))]
    name = f"ssah::{stem}_kernel<{row.arguments}>"
    return f"{above}\n}}\nconst void* const kernel = reinterpret_cast<const void*>(&{name});\n"


def compiled(row: Row, directory: Path, arch: int = 90) -> tuple[nvcc.Kernel, Cost]:
    """The row's kernel as nvcc compiles it, and what a turn of its main loop costs."""
    source = directory / "kernel.cu"
    source.write_text(kernel_alone(row))
    cubin = source.with_suffix(".cubin")
    name = f"{row.op.removesuffix('_')}_kernelI"
    found = [k for k in nvcc.compiled(source, cubin, arch, SOURCES) if name in k.name]
    if len(found) != 1:
        raise ValueError(f"{row} is {len(found)} kernels")
    code = run(nvcc.cuobjdump(), "-sass", "-fun", found[0].name, cubin)
    return found[0], cost(kernels(code)[found[0].name])


def line(row: Row, kernel: nvcc.Kernel, found: Cost) -> str:
    """The row in Markdown."""
    cells = [
        row.label,
        f"{row.before:g}",
        f"{found.per_element(row.moved):.1f}",
        f"{row.limit:g}",
        f"{found.doubles / found.elements(row.moved):g}",
        f"{kernel.registers}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    arch = int(sys.argv[1]) if len(sys.argv) > 1 else 90
    for each in ROWS:
        with tempfile.TemporaryDirectory() as folder:
            print(line(each, *compiled(each, Path(folder), arch)), flush=True)
