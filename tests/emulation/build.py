"""Builds csrc/cuda: as C++ for the CPU through the emulation, and with nvcc.

The emulated library registers the same host functions as CPU operators of a namespace of its own,
so that a test runs host function, launcher and kernel as they stand.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import include_paths

from ssah_kernels.schema import SCHEMAS

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "csrc" / "cuda"
ARCHS = (80, 90, 100)
PARALLEL = 2
STABLE = ["-std=c++17", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
TORCH_INCLUDES = [f"-I{path}" for path in include_paths()]
CXX = ["-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-fno-strict-aliasing", "-w"]
ALIGNED = ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]  # a GPU traps as well


def run(*command: object) -> str:
    """Run a compiler; its output. Raises with the output where it fails."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"[-6000:])
    return done.stdout + done.stderr


def in_parallel(jobs: Iterable[Callable[[], Any]]) -> list[Any]:
    with ThreadPoolExecutor(PARALLEL) as pool:
        return [future.result() for future in [pool.submit(job) for job in jobs]]


def source_of(op: str) -> str:
    return op.removesuffix("_") + ".cu"


def units(directory: Path) -> list[Path]:
    """All sources in two files of about equal cost: torch's headers are then read only twice."""
    files = sorted(SOURCES.glob("*.cu"))
    halves = [[f for f in files if f.name.startswith("gated") == half] for half in (True, False)]
    paths = []
    for number, half in enumerate(halves):
        paths.append(directory / f"unit{number}.cu")
        paths[-1].write_text("".join(f'#include "{file}"\n' for file in half))
    return paths


def emulation_object(source: Path, target: Path, optimise: str = "-O1") -> Path:
    """Compile one file as C++ against the headers that stand in for CUDA's."""
    includes = [f"-I{HERE / 'include'}", f"-I{SOURCES}", *TORCH_INCLUDES]
    flags = [*STABLE, optimise, *CXX, *ALIGNED, *includes]
    run("g++", *flags, "-x", "c++", "-c", source, "-o", target)
    return target


def registration(ops: Iterable[str], namespace: str) -> str:
    lines = [
        '#include "operators.h"',
        "#include <torch/csrc/stable/library.h>",
        f"STABLE_TORCH_LIBRARY_IMPL({namespace}, CPU, m) {{",
        *(f'  m.impl("{op}", TORCH_BOX(&ssah::{op.removesuffix("_")}_cuda));' for op in ops),
        "}",
    ]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Emulated:
    """A loaded library: operators of ``torch.ops.<namespace>`` that take CPU tensors."""

    namespace: str
    control: ctypes.CDLL
    schemas: torch.library.Library

    def kernel(self, op: str) -> Callable[..., Any]:
        return getattr(getattr(torch.ops, self.namespace), op).default

    def seed(self, seed: int) -> None:
        """Choose the order in which blocks and threads run from here on."""
        self.control.emulation_seed(ctypes.c_uint64(seed))

    def take_bytes_read(self) -> int:
        """Bytes that kernels read through ``__ldg`` since the last call."""
        return self.control.emulation_take_bytes_read()


def emulation_jobs(ops: Iterable[str], namespace: str, directory: Path) -> list[Callable[[], Path]]:
    """What to compile for the library of all operators; ``load`` takes the results."""
    files = [*units(directory), SOURCES / "masked_host.cu", HERE / "runtime.cpp"]
    for file in files[:2]:
        text = file.read_text()
        text = re.sub(r'#include "\S*/(register_cuda|masked_host)\.cu"\n', "", text)
        file.write_text(text)
    with files[0].open("a") as unit:
        unit.write(registration(ops, namespace))
    return [partial(emulation_object, file, directory / f"{file.stem}.o") for file in files]


def mutant_job(op: str, namespace: str, sources: Path) -> Callable[[], Path]:
    """The same for one operator of an altered copy of the sources; the runtime comes on top."""
    source = sources / source_of(op)
    source.write_text(source.read_text() + registration([op], namespace))
    return partial(emulation_object, source, sources / f"{namespace}.o", "-O0")


def load(objects: Iterable[Path], ops: Iterable[str], namespace: str, directory: Path) -> Emulated:
    """Link, define the schemas and load."""
    library = directory / f"{namespace}.so"
    torch_lib = Path(torch.__file__).parent / "lib"
    run(
        "g++", "-shared", "-Wl,-Bsymbolic", *objects, f"-L{torch_lib}", "-ltorch_cpu", "-o", library
    )
    schemas = torch.library.Library(namespace, "DEF")
    for op in ops:
        schemas.define(op + SCHEMAS[op])
    torch.ops.load_library(str(library))
    control = ctypes.CDLL(str(library))
    control.emulation_take_bytes_read.restype = ctypes.c_uint64
    return Emulated(namespace, control, schemas)


def nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


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


def cuda_object(source: Path, target: Path) -> list[Kernel]:
    """Compile with nvcc for every architecture; the kernels, from the assembler's report."""
    # As the library is built; on newer architectures the driver compiles its PTX for sm_90.
    archs = ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=[sm_90,sm_100]"]
    host = ["-Xcompiler=-fPIC,-O0"]
    flags = ["-O3", *STABLE, *TORCH_INCLUDES, *archs, *host, "-Xptxas=-v"]
    report = run(nvcc(), *flags, "-c", source, "-o", target)
    return [
        Kernel(m[1], int(m[2]), int(m[6]), int(m[3]) + int(m[4]) + int(m[5]))
        for m in ENTRY.finditer(report)
    ]
