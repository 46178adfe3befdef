"""Compiles csrc/cuda with nvcc, and reads what it made of the kernels."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emulation.build import SOURCES, STABLE, TORCH_INCLUDES, run

ARCHS = (80, 90, 100)  # on newer ones the driver compiles the PTX of 90
PARALLEL = 2


def in_parallel(jobs: Iterable[Callable[[], Any]]) -> list[Any]:
    with ThreadPoolExecutor(PARALLEL) as pool:
        return [future.result() for future in [pool.submit(job) for job in jobs]]


def units(directory: Path) -> list[Path]:
    """All sources in two files of about equal cost: torch's headers are then read only twice."""
    files = sorted(SOURCES.glob("*.cu"))
    halves = [[f for f in files if f.name.startswith("gated") == half] for half in (True, False)]
    paths = []
    for number, half in enumerate(halves):
        paths.append(directory / f"unit{number}.cu")
        paths[-1].write_text("".join(f'#include "{file}"\n' for file in half))
    return paths


def nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def release() -> str:
    """As ``13.0``."""
    return str(re.findall(r"release (\d+\.\d+)", run(nvcc(), "--version"))[0])


def cuobjdump() -> Path | None:
    """CUDA's own, or the one in Triton's package."""
    found = shutil.which("cuobjdump")
    if found is not None:
        return Path(found)
    try:
        import triton
    except ModuleNotFoundError:
        return None
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return path if path.exists() else None


@dataclass(frozen=True)
class Kernel:
    """What the compiler made of one kernel for one architecture."""

    name: str  # mangled
    arch: int
    registers: int
    spilled: int  # bytes of stack frame, spill stores and spill loads together


ENTRY = re.compile(
    r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers",
    re.DOTALL,
)


def compiled(source: Path, target: Path, arch: int, *includes: Path) -> list[Kernel]:
    """Compile for one architecture; the kernels, from the assembler's report.

    A ``target`` that ends in .cubin has the machine code alone, and takes half the time of an
    object that can be linked.
    """
    what = "-cubin" if target.suffix == ".cubin" else "-c"
    # As the library is built: the driver of a newer GPU compiles the PTX of 90.
    virtual = min(arch, 90)
    flags = ["-O3", *STABLE, *TORCH_INCLUDES, *(f"-I{folder}" for folder in includes)]
    flags.append(f"-gencode=arch=compute_{virtual},code=sm_{arch}")
    report = run(nvcc(), *flags, "-Xcompiler=-fPIC,-O0", "-Xptxas=-v", what, source, "-o", target)
    return [
        Kernel(m[1], int(m[2]), int(m[6]), int(m[3]) + int(m[4]) + int(m[5]))
        for m in ENTRY.finditer(report)
    ]
