"""What the two compiled libraries have in common: schemas from the catalogue, and loading."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch

from ssah_kernels.schema import KERNELS, SCHEMAS

FOLDER = Path(__file__).parents[1]


def define(namespace: str) -> torch.library.Library:
    """Define every operator as ``torch.ops.<namespace>.*``; the library then brings the kernels.

    Called while a module is imported, which Python does once: two threads that use a backend for
    the first time would otherwise both define it, which torch refuses.
    """
    library = torch.library.Library(namespace, "DEF")
    for op in KERNELS:
        library.define(op + SCHEMAS[op])
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
