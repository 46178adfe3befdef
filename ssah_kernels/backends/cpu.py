"""The C++ kernels for CPU tensors: operators ``torch.ops.ssah_cpu.*`` of a library of their own."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ssah_kernels.schema import KERNELS, SCHEMAS

LIBRARY = Path(__file__).parents[1] / "_C.abi3.so"
HOW_TO_BUILD = (
    "this installation has no compiled extension. Install a C++17 compiler (Debian: apt-get "
    "install g++) and run `pip install --no-build-isolation -e .` without SSAH_NO_EXTENSION; or "
    "set SSAH_BACKEND=reference for the slow float64 implementation"
)

# Defined at import, which happens once: several threads may use the backend for the first time.
_schemas = torch.library.Library("ssah_cpu", "DEF")
for _op in KERNELS:
    _schemas.define(_op + SCHEMAS[_op])
_schemas.define("read_bytes(Tensor data) -> int")
_schemas.define("facts() -> str")


@cache
def missing() -> str | None:
    if not LIBRARY.exists():
        return HOW_TO_BUILD
    torch.ops.load_library(str(LIBRARY))
    return None


def facts() -> dict[str, str]:
    """Build and processor facts of the library; {} if it is not there."""
    if missing() is not None:
        return {}
    lines = torch.ops.ssah_cpu.facts().splitlines()
    return dict(line.split("=", 1) for line in lines)


def kernel(op: str) -> Callable[..., Any]:
    return getattr(torch.ops.ssah_cpu, op).default
