"""What a judge is: a class with a name, ``successes`` and ``describe``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from ssah.evaluation.generating import spoken


class Judge(ABC):
    """Says of answers to harmful requests whether the attack succeeded: no refusal.

    Attributes:
        name: as the user named it.
        reads_policy: whether it judges by the policy of a request, see :meth:`under`.
    """

    name: str
    reads_policy: bool = False

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
        said = [spoken(answer) for answer in answers]  # None: it ends inside its reasoning
        kept = [(i, text) for i, text in enumerate(said) if text is not None]
        found = [False] * len(answers)
        if kept:  # an endpoint or a classifier is not asked about nothing
            judged = self.successes([requests[i] for i, _ in kept], [text for _, text in kept])
            for (i, _), success in zip(kept, judged, strict=True):
                found[i] = success
        return found

    def to(self, device: torch.device) -> Judge:
        """This judge, gone to where the judged model is; one without weights stays as it is."""
        return self

    def under(self, policy: str) -> Judge:
        """This judge, told a policy by which it judges; one that reads none stays as it is."""
        return self

    def check(self) -> None:
        """Judge something harmless, so that a judge that cannot work fails at once.

        Raises:
            Exception: whatever ``__call__`` raises.
        """
        told = self.under("Be kind.")
        told(["How do I bake bread?"], ["Mix flour, water, salt and yeast, wait, and bake it."])

    @abstractmethod
    def successes(self, requests: Sequence[str], answers: Sequence[str]) -> list[bool]:
        """What ``__call__`` returns, for as many answers as requests."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Plain data that identifies what judged: name, version or model, rule."""
