"""What the two compiled libraries have in common: schemas from the catalogue, and loading."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any

import torch

from ..checks import ACTIVATIONS
from ..schema import KERNELS, NAMESPACE, SCHEMAS

FOLDER = Path(__file__).parents[1]
# Why a copy of the package under another name has no library: the kernels in it are registered in
# the namespaces of the installed package.
COPY = (
    None
    if NAMESPACE == "ssah"
    else "this copy of ssah_kernels has no compiled kernels; the installed package has them "
    "(`pip install ssah-kernels`, then `import ssah_kernels`). SSAH_BACKEND=reference chooses the "
    "slow float64 implementation"
)


def schema(op: str) -> str:
    """The operator's schema, with the activation as its position in ``ACTIVATIONS``.

    A string that goes through torch's stable ABI is copied to the heap and never freed (torch 2.10
    to 2.14): 48 bytes a call.
    """
    return op + SCHEMAS[op].replace("str act='silu'", "int act")


def by_name(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel of ``schema``, called with the name of the activation."""

    @wraps(kernel)
    def call(*args: Any, act: str = "silu") -> Any:
        return kernel(*args, act=ACTIVATIONS.index(act))

    return call


@cache
def kernel(namespace: str, op: str) -> Callable[..., Any]:
    """The operator of a library, with the arguments of the catalogue."""
    function = getattr(getattr(torch.ops, namespace), op).default
    return by_name(function) if "str act" in SCHEMAS.get(op, "") else function


def define(namespace: str) -> torch.library.Library:
    """Define every operator as ``torch.ops.<namespace>.*``; the library then brings the kernels.

    Called while a module is imported, which Python does once: two threads that use a backend for
    the first time would otherwise both define it, which torch refuses.
    """
    library = torch.library.Library(namespace, "DEF")
    for op in KERNELS:
        library.define(schema(op))
    return library


@cache
def load(path: Path) -> ctypes.CDLL | str:
    """The library at ``path``, whose kernels are registered by then; or why it does not load.

    Any number of threads may call it: the system loads a library once. That is why this is not
    ``torch.ops.load_library``, which changes the flags of ``dlopen`` for the whole process.
    """
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        return (
            f"{path.name} does not load ({error}). It was built for another system or an "
            "incomplete torch: run `pip install --force-reinstall --no-deps "
            "--no-build-isolation .` in the sources of ssah to build it for this one"
        )
