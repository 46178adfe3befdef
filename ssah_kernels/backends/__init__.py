"""Which backend serves which device: the only place that chooses.

``reference``  plain PyTorch in float64, any device
``cpu``        C++, CPU
``triton``     Triton, any GPU (and CPU tensors under TRITON_INTERPRET=1)
``cuda``       CUDA C++, NVIDIA GPUs

On a CPU tensor ``cpu`` runs; on a CUDA tensor ``cuda`` if it was built for that GPU and loads,
else ``triton``; ``missing("cuda")`` says why not. The environment variable SSAH_BACKEND (read at
import) or ``use`` overrides the choice. There is no silent fall back to ``reference``: where no
kernel is there, an error says how to get one.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from ..checks import shown
from ..schema import KERNELS

__all__ = [
    "BACKENDS",
    "MissingBackendError",
    "available",
    "choose",
    "kernel",
    "missing",
    "stem",
    "use",
]

BACKENDS = ("reference", "cpu", "triton", "cuda")


def stem(op: str) -> str:
    """The file name of an operator, the same in every layer: ``channel_moments_`` and
    ``gated_moments_backward`` live in ``channel_moments`` and ``gated_moments``."""
    return op.removesuffix("_").removesuffix("_backward")


class MissingBackendError(RuntimeError):
    """The backend is not there for this operator; the message says how to get it."""


@cache
def _module(name: str) -> Any:
    """A module of this package. A call of an operator asks for several, each time."""
    return importlib.import_module(f"..{name}", __package__)


def _checked(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend is {shown(name)}; it must be one of {', '.join(BACKENDS)}")
    return name


_override: str | None = (
    _checked(os.environ["SSAH_BACKEND"]) if "SSAH_BACKEND" in os.environ else None
)


def missing(backend: str, device: torch.device | None = None) -> str | None:
    """Why the backend cannot be used here and how to get it; None if it can.

    Of several GPUs ``device`` names the one that is asked about (None: the current one).
    """
    if _checked(backend) == "reference":
        return None
    # Imported when it is asked for: Triton takes half a second, and may not be installed.
    module = _module(f"backends.{backend}")
    return module.missing(device) if backend == "cuda" else module.missing()


def kernel(backend: str, op: str, device: torch.device | None = None) -> Callable[..., Any]:
    """The function that computes ``op`` on ``backend``, for tensors on ``device``.

    Raises:
        MissingBackendError: the backend is not built, not installed, or not for this device.
    """
    why = missing(backend, device)
    if why is not None:
        raise MissingBackendError(f"ssah::{op}: backend {backend!r} is not available: {why}")
    if backend == "reference":
        return getattr(_module(f"reference.{stem(op)}"), op)
    return _module(f"backends.{backend}").kernel(op)


def choose(device: torch.device) -> str:
    """The name of the backend that serves tensors on ``device``."""
    if _override is not None:
        return _override
    if device.type == "cpu":
        return "cpu"
    # ROCm's GPUs are of type cuda too; missing() says that the library is not for them.
    if device.type == "cuda" and missing("cuda", device) is None:
        return "cuda"
    return "triton"


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Run every operator on ``backend`` inside the ``with`` block (whole process)."""
    global _override
    before, _override = _override, _checked(backend)
    try:
        yield
    finally:
        _override = before


def available() -> dict[str, dict[str, str]]:
    """Per operator and backend: "" if it can run here, else the reason why not."""
    return {op: {b: missing(b) or "" for b in BACKENDS} for op in KERNELS}
