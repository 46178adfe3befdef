"""The first stage: the libraries of this checkout.

They serve every torch from 2.10 and every Python from 3.10 on, so that those of any wheel in dist/
are taken as they are. Where nvcc is missing or does not fit, Triton serves.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.scope import Scope
from benchmarks.gpu.staged import Piece, Record, in_fork

ROOT = Path(__file__).resolve().parents[2]


def install(scope: Scope, _: Record) -> Iterator[Piece]:
    """The library that serves the device: as it is, from a wheel, or built here."""
    yield "libraries", lambda: libraries(scope)


def libraries(scope: Scope, root: Path = ROOT) -> dict[str, Any]:
    """How they came to be there.

    Raises:
        RuntimeError: they were built and do not work; it has the end of what the build printed.
    """
    wanted = scope.backends[0]
    if unusable(wanted) is None:
        return {"how": "they were there"}
    wheels = sorted(root.glob("dist/ssah_kernels-*.whl"), key=lambda path: path.stat().st_mtime)
    if wheels:
        unpack(wheels[-1], root)
        if unusable(wanted) is None:
            return {"how": f"from {wheels[-1].name}"}
    log = build(root)
    why = unusable(wanted)
    if why is not None and "triton" in scope.backends and unusable("triton") is None:
        return {"how": "Triton alone", "why": why, "log": log}
    if why is not None:
        raise RuntimeError(f"{why}; the build ended with: {log}")
    return {"how": "built here"}


def unusable(backend: str) -> str | None:
    """Why a backend cannot be used, in a process of its own: what is loaded stays as it was."""

    def look() -> str | None:
        from ssah_kernels import backends

        return backends.missing(backend)

    why: str | None = in_fork(look)
    return why


def unpack(wheel: Path, root: Path) -> None:
    """Put the libraries of a wheel where this checkout looks for them."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith("ssah_kernels/") and name.endswith(".so"):
                archive.extract(name, root)


def build(root: Path) -> str:
    """Build what this machine can, all files at once; the end of what was printed."""
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        cwd=root,
        # Files side by side, and the machine code of each for several GPUs side by side.
        env={"MAX_JOBS": str(os.cpu_count()), "NVCC_APPEND_FLAGS": "--threads 2", **os.environ},
    )
    return done.stdout.strip()[-1500:]
