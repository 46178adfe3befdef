"""The CUDA C++ kernels: operators ``torch.ops.ssah_cuda.*``, a library loaded only with a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ssah_kernels.schema import KERNELS, SCHEMAS


def built() -> Path | None:
    """The CUDA library of this installation, whether or not a GPU is present."""
    return next(iter(sorted(Path(__file__).parents[1].glob("_C_cuda*.so"))), None)


@cache
def _load() -> tuple[str | None, torch.library.Library | None]:
    path = built()
    if path is None:
        return (
            "this installation has no CUDA kernels. Install the CUDA toolkit (nvcc) and run "
            "`SSAH_CUDA=1 pip install --no-build-isolation -e .`, or install triton"
        ), None
    if not torch.cuda.is_available():
        return "torch sees no CUDA device (torch.cuda.is_available() is False)", None
    library = torch.library.Library("ssah_cuda", "DEF")
    for op in KERNELS:
        library.define(op + SCHEMAS[op])
    torch.ops.load_library(str(path))
    return None, library


def missing() -> str | None:
    return _load()[0]


def kernel(op: str) -> Callable[..., Any]:
    return getattr(torch.ops.ssah_cuda, op).default
