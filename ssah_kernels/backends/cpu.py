"""The C++ kernels for CPU tensors: operators ``torch.ops.ssah_cpu.*`` of a library of their own."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from ..schema import NAMESPACE
from . import native

LIBRARY = native.FOLDER / "_C.abi3.so"
HOW_TO_BUILD = (
    "this installation has no compiled extension. Install the wheel of ssah-kernels; or install a "
    "C++17 compiler (Debian: apt-get install g++) and run `pip install --no-build-isolation -e .` "
    "in the sources without SSAH_NO_EXTENSION; or set SSAH_BACKEND=reference for the "
    "slow float64 implementation"
)

_NAMESPACE = f"{NAMESPACE}_cpu"
_schemas = native.define(_NAMESPACE)  # kept: torch forgets the operators with the object
_schemas.define("read_bytes(Tensor data) -> int")
_schemas.define("facts() -> str")
_schemas.define("placement(Tensor[] fixed, Tensor[] grads) -> Tensor")
_schemas.define(
    "is_placed(Tensor[] fixed, Tensor[] grads, Tensor placement, Tensor stretches) -> bool"
)


@cache
def missing() -> str | None:
    """Why the kernels cannot run here and how to get them; None if they can."""
    if native.COPY is not None or not LIBRARY.exists():
        return native.COPY or HOW_TO_BUILD
    loaded = native.load(LIBRARY)
    return loaded if isinstance(loaded, str) else None


def facts() -> dict[str, str]:
    """Build and processor facts of the library; {} if it is not there."""
    if missing() is not None:
        return {}
    lines = torch.ops.ssah_cpu.facts().splitlines()
    return dict(line.split("=", 1) for line in lines)


def kernel(op: str) -> Callable[..., Any]:
    return native.kernel(_NAMESPACE, op)
