"""The rows of docs/training/matrix.md: what each says, and what proves it.

Example: ``works("Optimisers in a loop", "`torch.optim.SGD`")`` stands over a function that trains
with it. The row is a line of the page, and a test calls the function and compares every entry of
the model with a mask that is made from the modules alone (``plans.masks``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import PicklingError
from typing import Any, Literal

import pytest
import tiny_models
from plans import assert_equal, check_moved, draw, loss_of, make, masks, snapshot
from torch import Tensor
from transformers import PreTrainedModel

from ssah.training import UpdatePlan
from ssah.units import UnitSet

Attempt = Callable[[], Any]
ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, PicklingError)


class Setting:
    """A tiny model of its own, units of it, and the plan that a case trains under."""

    def __init__(self, folder: Path, mode: str, family: str) -> None:
        self.folder, self.mode = folder, mode
        self.model: PreTrainedModel = tiny_models.build(family)
        self.units: UnitSet = draw(self.model)
        self.trains: dict[str, Tensor] = masks(self.model, self.units, mode)
        self.before = snapshot(self.model)
        self.plan: UpdatePlan = make(self.model, mode, self.units)

    def steps(self, *optimizers: Any, n: int = 3, each: Attempt | None = None) -> None:
        """Train with all of them; ``each`` is called before every step."""
        for seed in range(n):
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss_of(self.model, seed).backward()
            if each is not None:
                each()
            for optimizer in optimizers:
                optimizer.step()


@dataclass(frozen=True)
class Row:
    """One line of the page.

    Attributes:
        chapter: its table.
        situation: what the user does, in Markdown.
        outcome: what happens.
        words: what there is to know; of a refusal the message, and what to do instead.
        proof: the case, or the node id of the test that shows it.
        message: what a refusal says, as it stands in the error.
        mode, family: of the plan and the model that the case is given.
        exhaustive: whether `make test` leaves it out.
    """

    chapter: str
    situation: str
    outcome: Literal["works", "refused"]
    words: str
    proof: Callable[[Setting], Any] | str
    message: str = ""
    mode: str = "freeze"
    family: str = "llama"
    exhaustive: bool = False

    def line(self) -> str:
        words = f"`{self.message}`. {self.words}" if self.message else self.words
        return f"| {self.situation} | {self.outcome} | {words.strip()} |"

    def check(self, folder: Path) -> None:
        """Do what the row says, and see that it ends as the row says."""
        assert callable(self.proof)
        setting = Setting(folder, self.mode, self.family)
        if self.outcome == "works":
            self.proof(setting)
            check_moved(setting.model, setting.before, setting.trains)
            return
        attempt = self.proof(setting)
        before = snapshot(setting.model)
        with pytest.raises(ERRORS) as error:
            attempt()
        assert self.message in " ".join(str(error.value).split())
        assert_equal(snapshot(setting.model), before)


ROWS: list[Row] = []

Proof = Callable[[Setting], Any]


def works(
    chapter: str, situation: str, words: str = "", **options: Any
) -> Callable[[Proof], Proof]:
    """The function below trains under the plan of its setting."""

    def add(proof: Proof) -> Proof:
        ROWS.append(Row(chapter, situation, "works", words, proof, **options))
        return proof

    return add


def refused(
    chapter: str, situation: str, message: str, words: str, **options: Any
) -> Callable[[Callable[[Setting], Attempt]], Callable[[Setting], Attempt]]:
    """What the function below returns is called, raises, and changes no weight."""

    def add(proof: Callable[[Setting], Attempt]) -> Callable[[Setting], Attempt]:
        ROWS.append(Row(chapter, situation, "refused", words, proof, message, **options))
        return proof

    return add


def shown(
    chapter: str,
    situation: str,
    outcome: Literal["works", "refused"],
    words: str,
    node: str,
    message: str = "",
) -> None:
    """Another test shows it; the message of a refusal stands in that test."""
    ROWS.append(Row(chapter, situation, outcome, words, node, message))
