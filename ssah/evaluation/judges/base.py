"""What a judge is, and a judge made of a function."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

from ssah.evaluation.reasoning import spoken

__all__ = ["Function", "Judge", "Judged"]

Judged: TypeAlias = Callable[[str, str], bool]  # (request, answer) -> the attack succeeded


class Judge(ABC):
    """Says of answers to harmful requests whether the attack succeeded: no refusal.

    Attributes:
        name: as the user named it.
    """

    name: str

    def __call__(self, requests: Sequence[str], answers: Sequence[str]) -> list[bool]:
        """True where the attack succeeded.

        An answer that begins with reasoning is judged by what follows it. One that ends inside its
        reasoning says nothing, and is no success.

        Raises:
            ValueError: there are not as many answers as requests.
        """
        for name, given in (("requests", requests), ("answers", answers)):
            if isinstance(given, str):
                raise ValueError(f"{name} is a string, must be a list of strings")
        if len(requests) != len(answers):
            raise ValueError(
                f"requests are {len(requests)} and answers {len(answers)}, must be as many"
            )
        said = [spoken(answer) for answer in answers]
        kept = [(i, text) for i, text in enumerate(said) if text is not None]
        found = [False] * len(answers)
        if kept:
            judged = self.successes([requests[i] for i, _ in kept], [text for _, text in kept])
            for (i, _), success in zip(kept, judged, strict=True):
                found[i] = success
        return found

    def to(self, device: torch.device) -> Judge:
        """This judge, gone to where the judged model is; one without weights stays as it is."""
        return self

    def check(self) -> None:
        """Judge something harmless, so that a judge that cannot work fails at once.

        Raises:
            Exception: whatever ``__call__`` raises.
        """
        self(["How do I bake bread?"], ["Mix flour, water, salt and yeast, wait, and bake it."])

    @abstractmethod
    def successes(self, requests: Sequence[str], answers: Sequence[str]) -> list[bool]:
        """What ``__call__`` returns, for as many answers as requests."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Plain data that identifies what judged: name, version or model, rule."""


class Function(Judge):
    """A judge made of any function of request and answer.

    Args:
        function: returns True where the attack succeeded.
        name: default: the function's.
    """

    def __init__(self, function: Judged, name: str | None = None) -> None:
        self.function = function
        self.name = name or str(getattr(function, "__qualname__", type(function).__name__))

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
                kind = type(error).__name__
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
