"""Names of earlier releases, which go on working for one release with a warning.

`MOVED` has the import paths. `renamed` is for parameters: ``attribute(model, loader, group=None)``
warns, and does what ``attribute(model, loader, process_group=None)`` does.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

# The path of an earlier release -> where that is now.
MOVED = {
    "ssah.ablation": "ssah.interventions",
    "ssah.families": "ssah.units",
    "ssah.finetune": "ssah.training.finetune",
    "ssah.memory": "ssah.training.finetune.memory",
    "ssah.probing": "ssah.evaluation.probing",
    "ssah.streaming": "ssah.attribution.streaming",
}


# Neither class has its base of importlib.abc, which would double the time of `import ssah`.
class _Forward:
    """Loads a module that has the names of another one."""

    def create_module(self, spec: ModuleSpec) -> None:
        return None  # Python's own

    def exec_module(self, module: ModuleType) -> None:
        path = MOVED[module.__name__]
        warnings.warn(
            f"{module.__name__} is now {path}: the old path goes with the next release",
            DeprecationWarning,
            stacklevel=2,  # the line that imports: Python leaves its own frames out
        )
        home = import_module(path)
        module.__doc__, module.__all__ = home.__doc__, home.__all__  # type: ignore[attr-defined]
        # Looked up in the new place each time, so that both paths always give the same object.
        module.__getattr__ = lambda name: getattr(home, name)  # type: ignore[method-assign]


class _Finder:
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(name, _Forward()) if name in MOVED else None  # type: ignore[arg-type]


def accept() -> None:
    """Let ``import`` find the paths of `MOVED`; called once, as the package is imported."""
    sys.meta_path.append(_Finder())  # the last to be asked, after those that find files


def renamed(**parameters: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a function take keyword arguments under the names of an earlier release.

    Example: ``@renamed(group="process_group")`` above a function that has ``process_group``. The
    signature that users, documentation and type checkers see has the new name alone.

    Args:
        parameters: the old name of each parameter -> the new one.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        name = function.__qualname__.removesuffix(".__init__")

        @wraps(function)
        def accepting(*args: Any, **kwargs: Any) -> R:
            for old, new in parameters.items():
                if old not in kwargs:
                    continue
                if new in kwargs:
                    raise TypeError(
                        f"{name} was given {new} and its old name {old}, must be given {new} alone"
                    )
                warnings.warn(
                    f"{name}({old}=) is now {name}({new}=): the old name goes with the next "
                    "release",
                    DeprecationWarning,
                    stacklevel=2,  # the caller's line
                )
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return accepting

    return decorate
