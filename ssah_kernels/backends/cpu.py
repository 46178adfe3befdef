"""The C++ kernels for CPU tensors: operators ``torch.ops.ssah_cpu.*`` of the extension ``_C``."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch

from ssah_kernels.schema import KERNELS, SCHEMAS

HOW_TO_BUILD = (
    "this installation has no compiled extension. Install a C++17 compiler (Debian: apt-get "
    "install g++) and run `pip install --no-build-isolation -e .` without SSAH_NO_EXTENSION; or "
    "set SSAH_BACKEND=reference for the slow float64 implementation"
)


@cache
def _load() -> tuple[ModuleType | None, torch.library.Library]:
    library = torch.library.Library("ssah_cpu", "DEF")
    for op in KERNELS:
        library.define(op + SCHEMAS[op])
    try:
        return importlib.import_module("ssah_kernels._C"), library
    except ModuleNotFoundError:
        return None, library


def facts() -> dict[str, str]:
    """Build and processor facts of the extension; {} if it is not built."""
    extension, _ = _load()
    return {} if extension is None else extension.facts()


def missing() -> str | None:
    return HOW_TO_BUILD if _load()[0] is None else None


def kernel(op: str) -> Callable[..., Any]:
    return getattr(torch.ops.ssah_cpu, op).default
