"""What a comparison does, before it is done: the steps for the row of each method."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ssah.studies.compare.comparing import INTACT, NONE
from ssah.studies.compare.lineup import Entrant
from ssah.studies.run_folder import Run

Kind: TypeAlias = Literal["find", "train", "measure", "calibrate"]


@dataclass(frozen=True)
class Planned:
    """A step.

    Attributes:
        name: of it.
        kind: what is done.
        method: for whose row; ``"none"`` for what all of them share.
    """

    name: str
    kind: Kind
    method: str


def plan(entrants: Sequence[Entrant], seeds: Sequence[int]) -> list[Planned]:
    """The steps of a comparison in their order, without those that every study has.

    A method that refuses the model has fewer of them.
    """
    steps = [Planned(f"measure-{INTACT}", "measure", INTACT)]
    for seed in seeds:
        steps += list(_trained(NONE, NONE, seed))
    for entrant in entrants:
        if entrant.lacking is None:
            steps += list(_of(entrant, seeds))
    # All edits are held against one point of the model that they edit.
    return list({step.name: step for step in steps}.values())


def _trained(name: str, method: str, seed: int) -> Iterator[Planned]:
    yield Planned(f"train-{name}-{seed}", "train", method)
    yield Planned(f"measure-{name}-{seed}", "measure", method)


def _of(entrant: Entrant, seeds: Sequence[int]) -> Iterator[Planned]:
    name = entrant.name
    yield Planned(f"find-{name}", "find", name)
    if entrant.swept:
        yield Planned(f"calibrate-{NONE}-{seeds[0]}", "calibrate", NONE)
        for strength in entrant.method.strengths:
            for control in ("", "-control"):
                yield Planned(f"calibrate-{name}-at-{strength:g}{control}", "calibrate", name)
    for seed in seeds:
        for own in (name, f"{name}-control"):
            if entrant.way == "train":
                yield from _trained(own, name, seed)
            elif entrant.subject == "aligned" and own == name:
                yield Planned(f"measure-{own}", "measure", name)
            else:
                yield Planned(f"measure-{own}-{seed}", "measure", name)


def left(steps: Sequence[Planned], run: Run) -> list[Planned]:
    """The steps that are not done yet; those of a method that refused the model are done."""
    found = {
        step.method: run.result(step.name)
        for step in steps
        if step.kind == "find" and run.done(step.name)
    }

    def is_left(step: Planned) -> bool:
        own = found.get(step.method, {"refused": None, "no_control": None})
        no_such = own["refused"] or (own["no_control"] and "-control" in step.name)
        return not (run.done(step.name) or no_such)

    return [step for step in steps if is_left(step)]
