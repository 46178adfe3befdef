"""What tests do with the emulated operators."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cases import CASES, check_backend
from emulation.build import Emulated

from ssah_kernels import backends, checks


def kept_in(config: pytest.Config) -> Path:
    """Where compiled files are kept, from one run of pytest to the next."""
    assert config.cache is not None
    return config.cache.mkdir("emulation")


def checked(library: Emulated) -> Callable[..., Any]:
    """The operator behind its argument checks, as the dispatcher calls it."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return library(*getattr(checks, library.op)(*args, **kwargs), **kwargs)

    return call


def equals_reference(library: Emulated, **options: Any) -> int:
    reference = backends.kernel("reference", library.op)
    return check_backend(CASES[library.op], checked(library), reference, **options)
