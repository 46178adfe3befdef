"""Submodules that are attributes of their package before anybody has imported them."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

__all__ = ["submodules_of"]


def submodules_of(package: str) -> Callable[[str], ModuleType]:
    """A ``__getattr__`` for ``package`` that imports its public submodules as they are first used.

    Example: ``__getattr__ = submodules_of(__name__)`` in ``ssah/report/__init__.py`` makes
    ``ssah.report.html`` work after ``import ssah``.
    """

    def __getattr__(name: str) -> ModuleType:
        # Python asks a package for __path__ and the like: no module is looked for then.
        if not name.startswith("_") and find_spec(f"{package}.{name}") is not None:
            return import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return __getattr__
