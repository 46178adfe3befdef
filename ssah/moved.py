"""Import paths of earlier releases, which go on working for one release with a warning."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["MOVED", "accept"]

# The path of an earlier release -> where that is now.
MOVED = {
    "ssah.ablation": "ssah.interventions",
    "ssah.families": "ssah.units",
    "ssah.finetune": "ssah.training.finetune",
    "ssah.memory": "ssah.training.finetune.memory",
    "ssah.probing": "ssah.evaluation.probing",
    "ssah.streaming": "ssah.attribution.streaming",
}


class _Forward(Loader):
    """Loads a module that has the names of another one."""

    def create_module(self, spec: ModuleSpec) -> None:
        return None  # Python's own

    def exec_module(self, module: ModuleType) -> None:
        path = MOVED[module.__name__]
        warnings.warn(
            f"{module.__name__} is now {path}: the old path goes with the next release",
            DeprecationWarning,
            stacklevel=2,
        )
        home = import_module(path)
        module.__doc__, module.__all__ = home.__doc__, home.__all__  # type: ignore[attr-defined]
        module.__getattr__ = lambda name: getattr(home, name)  # type: ignore[method-assign]


class _Finder(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(name, _Forward()) if name in MOVED else None


def accept() -> None:
    """Let ``import`` find the paths of `MOVED`; called once, as the package is imported."""
    sys.meta_path.append(_Finder())
