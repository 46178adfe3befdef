"""Compile Triton launches for a GPU that is not there, exactly as the launcher would.

A stand-in driver names the target; Triton's own ``warmup`` then specialises on the real arguments
(alignment of pointers, divisibility of sizes, constants, warps) and compiles down to a cubin.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sass import Cost, cost, kernels
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from ssah_kernels.backends.triton.launch import Launch


class TargetOnly:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one launch."""

    name: str
    ptx: str
    registers: int
    spill_bytes: int  # local memory ("STACK" and "LOCAL" of cuobjdump)
    shared_bytes: int
    cost: Cost

    def wide_loads(self) -> int:
        """Global loads of 16 bytes."""
        return len(re.findall(r"ld\.global\S*\.(?:v4\.[bfu]32|v2\.[bfu]64)", self.ptx))

    def loop_barriers(self) -> int:
        """Barriers inside loops: between a label and a later branch back to it."""
        lines = self.ptx.splitlines()
        label_at = {
            line.split(":")[0]: i for i, line in enumerate(lines) if line.startswith("$L__BB")
        }
        inside: set[int] = set()
        for i, line in enumerate(lines):
            target = re.search(r"\bbra(?:\.uni)?\s+(\$L__BB\w+)", line)
            if target and label_at.get(target[1], i) < i:
                inside.update(range(label_at[target[1]], i))
        return sum("bar.sync" in lines[i] for i in inside)

    def wide_stores(self) -> int:
        return len(re.findall(r"st\.global\S*\.(?:v4\.[bfu]32|v2\.[bfu]64)", self.ptx))


@cache  # launches of different choices share the kernels that add their parts
def disassembly(cubin: bytes) -> str:
    """What cuobjdump prints of a cubin: the resources that each kernel uses, and its code."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        return subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", str(path)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout


def compile_launch(launch: Launch, arch: int) -> Compiled:
    """Compile ``launch`` for sm_``arch``."""
    driver.set_active(TargetOnly(arch))
    kernel: Any = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.keywords)
    printed = disassembly(kernel.asm["cubin"])
    name = kernel.metadata.name
    facts = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", printed)}
    return Compiled(
        name,
        kernel.asm["ptx"],
        facts["REG"],
        facts["STACK"] + facts["LOCAL"],
        kernel.metadata.shared,
        cost(kernels(printed)[name]),
    )
