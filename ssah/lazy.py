"""Names and submodules that are attributes of their package before anybody has imported them."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any


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


def names_of(package: str, **submodules: str) -> Callable[[str], Any]:
    """A ``__getattr__`` for ``package`` that imports the names of its submodules when one is used.

    Example: ``__getattr__ = names_of(__name__, plan="UpdatePlan", freezing="freeze train_only")``.

    Args:
        package: whose names they are.
        submodules: submodule -> the names that it defines. Other public submodules are attributes
            too, as `submodules_of` has it.
    """
    home = {name: module for module, names in submodules.items() for name in names.split()}
    submodule = submodules_of(package)

    def __getattr__(name: str) -> Any:
        if name in home:
            return getattr(import_module(f"{package}.{home[name]}"), name)
        return submodule(name)

    return __getattr__
