"""The CUDA C++ kernels: operators ``torch.ops.ssah_cuda.*``, a library loaded only with a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..schema import NAMESPACE
from . import fatbin, native

LIBRARY = native.FOLDER / "_C_cuda.abi3.so"
OR_TRITON = "Triton serves this GPU where it is installed (`pip install triton`)"

_NAMESPACE = f"{NAMESPACE}_cuda"
_schemas = native.define(_NAMESPACE)  # kept: torch forgets the operators with the object


def built() -> Path | None:
    """The CUDA library of this installation, whether or not a GPU is present."""
    return LIBRARY if native.COPY is None and LIBRARY.exists() else None


@cache
def _library() -> ctypes.CDLL | str:
    """The library, ready to launch kernels on a GPU that it was built for; or why it is not."""
    path = built()
    if path is None:
        return native.COPY or (
            "this installation has no CUDA kernels. Install the CUDA toolkit (nvcc) and run "
            "`SSAH_CUDA=1 pip install --no-build-isolation -e .`, or install triton"
        )
    if not torch.cuda.is_available():
        return "torch sees no CUDA device (torch.cuda.is_available() is False)"
    if torch.version.cuda is None:  # torch.cuda is also the name under which ROCm's GPUs go
        return f"this torch is built for ROCm, not for CUDA. {OR_TRITON}"
    library = native.load(path)
    return library if isinstance(library, str) else _unready(library) or library


def _unready(library: ctypes.CDLL) -> str | None:
    """Why a library that loaded cannot launch kernels, if it cannot."""
    if not library.ssah_cuda_finds_stream():
        return (
            "the CUDA kernels do not find the current stream of this torch "
            f"(aoti_torch_get_current_cuda_stream), although it is {torch.__version__}: build "
            f"them again beside it, and report this. {OR_TRITON}"
        )
    driver, runtime = library.ssah_cuda_driver_version(), library.ssah_cuda_runtime_version()
    # Versions are 1000 major + 10 minor. Within a major version any driver serves any library.
    if driver // 1000 < runtime // 1000:
        return (
            f"the CUDA kernels were built with CUDA {runtime // 1000} and the driver of this "
            f"machine serves CUDA {driver // 1000}: update the driver, or build them with CUDA "
            f"{driver // 1000}. {OR_TRITON}"
        )
    return None


@cache
def _unserved(gpu: int) -> str | None:
    """Why a GPU cannot run the machine code of the library, if it cannot."""
    architectures = fatbin.architectures(LIBRARY)
    major, minor = torch.cuda.get_device_capability(gpu)
    if fatbin.serves(architectures, (major, minor)):
        return None
    return (
        f"the CUDA kernels were built for {', '.join(architectures)}, and cuda:{gpu} is "
        f"sm_{major}{minor}. {OR_TRITON}"
    )


def missing(device: torch.device | None = None) -> str | None:
    """Why the kernels cannot run on ``device`` (None: the current GPU); None if they can."""
    library = _library()
    if isinstance(library, str):
        return library
    gpu = None if device is None else device.index  # None too: "cuda" is the current one
    return _unserved(torch.cuda.current_device() if gpu is None else gpu)


def kernel(op: str) -> Callable[..., Any]:
    return native.kernel(_NAMESPACE, op)
