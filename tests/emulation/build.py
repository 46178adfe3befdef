"""Builds csrc/cuda as C++ for the CPU, one library an operator, through the emulation.

A library registers its host function as a CPU operator of a namespace of its own, so that a test
runs host function, launcher and kernel as they stand. What was compiled is kept in a folder that
all test processes share, under the hash of everything that went into it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import include_paths

from ssah_kernels.backends import native

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "csrc" / "cuda"
STABLE = ["-std=c++17", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
TORCH_INCLUDES = [f"-I{path}" for path in include_paths()]
CXX = ["-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-fno-strict-aliasing", "-w"]
ALIGNED = ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]  # a GPU traps as well
INCLUDE = re.compile(r'^\s*#include [<"]([^>"]+)[>"]', re.MULTILINE)
KEPT = 200  # compiled files; the oldest go


def run(*command: object) -> str:
    """Run a compiler; its output. Raises with the output where it fails."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"[-6000:])
    return done.stdout + done.stderr


def source_of(op: str) -> str:
    return op.removesuffix("_") + ".cu"


@cache
def compiler() -> str:
    return run("g++", "--version")


def once(folder: Path, name: str, key: Iterable[str], make: Callable[[Path], object]) -> Path:
    """The file ``name`` in ``folder`` for ``key``, made unless it is there.

    Two processes may make it at the same time: each writes a file of its own and renames it.
    """
    facts = "\0".join([compiler(), torch.__version__, *key])
    path = folder / f"{hashlib.sha256(facts.encode()).hexdigest()[:16]}-{name}"
    if path.exists():
        path.touch()
        return path
    mine = path.with_name(f"{path.name}.{os.getpid()}")
    make(mine)
    mine.replace(path)
    for old in sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime)[:-KEPT]:
        old.unlink(missing_ok=True)
    return path


@dataclass(frozen=True)
class Emulated:
    """A loaded library: the operator ``op`` of ``torch.ops.<namespace>``, on CPU tensors."""

    op: str
    namespace: str
    control: ctypes.CDLL
    schema: torch.library.Library  # defined as long as this lives

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return native.kernel(self.namespace, self.op)(*args, **kwargs)

    def seed(self, seed: int) -> None:
        """Choose the order in which blocks and threads run from here on."""
        self.control.emulation_seed(ctypes.c_uint64(seed))

    def capture(self, on: bool) -> None:
        """Let every stream be one that is being captured into a CUDA graph, or no longer."""
        self.control.emulation_capture(ctypes.c_bool(on))

    def take_bytes_read(self) -> int:
        """Bytes that kernels read through ``__ldg`` since the last call."""
        return self.control.emulation_take_bytes_read()


class Emulation:
    """The operators of ``sources``; each is built when it is first asked for.

    Args:
        folder: where compiled files are kept.
        tag: part of the namespaces; another one for altered sources.
        optimise: of the compiler. -O1 takes half as long again to compile what runs as fast; what
            -O0 makes takes four times as long to run.
    """

    def __init__(
        self, folder: Path, sources: Path = SOURCES, tag: str = "emulated", optimise: str = "-Og"
    ) -> None:
        self.folder, self.sources, self.tag, self.optimise = folder, sources, tag, optimise
        folder.mkdir(parents=True, exist_ok=True)
        self._loaded: dict[str, Emulated] = {}

    def __getitem__(self, op: str) -> Emulated:
        if op not in self._loaded:
            self._loaded[op] = self._load(op)
        return self._loaded[op]

    def compiled(self, name: str, text: str) -> Path:
        """The object of one C++ text, compiled against the headers that stand in for CUDA's."""
        # The last finds csrc/dynamic_map.h for altered sources, which are copied without it.
        includes = [f"-I{HERE / 'include'}", f"-I{self.sources}", f"-I{SOURCES}"]
        flags = [*STABLE, self.optimise, *CXX, *ALIGNED]
        key = [*flags, text, *self._headers(text)]

        def compile_to(target: Path) -> None:
            source = target.with_suffix(".cpp")
            source.write_text(text)
            run("g++", *flags, *includes, *TORCH_INCLUDES, "-c", source, "-o", target)
            source.unlink()

        return once(self.folder, f"{name}.o", key, compile_to)

    def _headers(self, text: str) -> list[str]:
        """The texts of all headers of ours that a text includes, directly or not."""
        found: dict[str, str] = {}
        waiting = [text]
        while waiting:
            for name in INCLUDE.findall(waiting.pop()):
                for folder in (HERE / "include", self.sources, SOURCES):
                    if name not in found and (folder / name).exists():
                        found[name] = (folder / name).read_text()
                        waiting.append(found[name])
        return [found[name] for name in sorted(found)]

    def _load(self, op: str) -> Emulated:
        namespace = f"ssah_{self.tag}_{op.rstrip('_')}"
        host = f"{op.removesuffix('_')}_cuda"
        registration = (
            '\n#include "operators.h"\n#include <torch/csrc/stable/library.h>\n'
            f"STABLE_TORCH_LIBRARY_IMPL({namespace}, CPU, m) {{\n"
            f'  m.impl("{op}", TORCH_BOX(&ssah::{host}));\n}}\n'
        )
        parts = {
            op: (self.sources / source_of(op)).read_text() + registration,
            "runtime": (HERE / "runtime.cpp").read_text(),
        }
        if op.startswith("masked"):
            parts["masked_host"] = (self.sources / "masked_host.cu").read_text()
        objects = [self.compiled(name, text) for name, text in parts.items()]

        def link(target: Path) -> None:
            torch_lib = Path(torch.__file__).parent / "lib"
            run(
                "g++", "-shared", "-Wl,-Bsymbolic", *objects,
                f"-L{torch_lib}", "-ltorch_cpu", "-o", target,
            )  # fmt: skip

        library = once(self.folder, f"{namespace}.so", [o.name for o in objects], link)
        schema = torch.library.Library(namespace, "DEF")
        schema.define(native.schema(op))
        torch.ops.load_library(str(library))
        control = ctypes.CDLL(str(library))
        control.emulation_take_bytes_read.restype = ctypes.c_uint64
        return Emulated(op, namespace, control, schema)
