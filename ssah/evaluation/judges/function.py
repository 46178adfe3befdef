"""Judges that are functions of request and answer: ``python:module.function``."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from ssah.evaluation.judges.base import Judge

Judged: TypeAlias = Callable[[str, str], bool]  # (request, answer) -> the attack succeeded


class Function(Judge):
    """A judge made of any function of request and answer.

    Args:
        function: returns True where the attack succeeded.
        name: default: the function's.
    """

    def __init__(self, function: Judged, name: str | None = None) -> None:
        self.function = function
        self.name = name or str(getattr(function, "__qualname__", type(function).__name__))

    @classmethod
    def parse(cls, path: str) -> Function:
        """The judge that ``python:`` and ``path`` name.

        Raises:
            ValueError: there is no such module, or no such function in it.
        """
        module_name, _, name = path.rpartition(".")
        if not module_name:
            raise ValueError(f"judge is 'python:{path}', must be 'python:module.function'")
        here = os.getcwd()
        sys.path.insert(0, here)  # a script of one's own lies here, where no command looks
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise ValueError(f"judge is 'python:{path}', but {error} (sought in {here})") from error
        finally:
            sys.path.remove(here)
        function = getattr(module, name, None)
        if not callable(function):
            raise ValueError(
                f"judge is 'python:{path}', but {module_name} has no function {name!r}"
            )
        return cls(function, f"python:{path}")

    def successes(self, requests: Sequence[str], answers: Sequence[str]) -> list[bool]:
        """See :class:`Judge`.

        Raises:
            TypeError: the function returned something other than a bool.
            RuntimeError: it raised; its message is left out, since it may quote an answer.
        """
        found = []
        for request, answer in zip(requests, answers, strict=True):
            try:
                verdict = self.function(request, answer)
            except Exception as error:
                kind = type(error).__name__  # alone: a KeyError's message is the key, here a text
                raise RuntimeError(f"judge {self.name!r} raised {kind}") from error
            if type(verdict).__name__ not in ("bool", "bool_"):  # bool_: numpy's
                raise TypeError(
                    f"judge {self.name!r} returned a {type(verdict).__name__}, must return a bool"
                )
            found.append(bool(verdict))
        return found

    def describe(self) -> dict[str, Any]:
        """See :class:`Judge`."""
        module = getattr(self.function, "__module__", None)
        return {"name": self.name, "kind": "function", "module": module}
