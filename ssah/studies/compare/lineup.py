"""Which methods are compared, on what each acts, and what keeps one from running.

What is done with a method follows from what it gives and what it needs:

    gives      needs "tuned"   the model that is measured
    Changed    no              the aligned one, changed as it runs
    Changed    yes             the one fine-tuned with nothing kept, changed as it runs
    Trained    -               fine-tuned with a part frozen
    Procedure  -               fine-tuned in another way
    Edited     no              edited, then fine-tuned; the aligned one, edited, where refusals are
                               to be removed
    Edited     yes             fine-tuned with nothing kept, then edited
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from ssah.choices import check_choice
from ssah.methods import Method, describe, names, typed_method
from ssah.studies.compare.settings import ALL

Way: TypeAlias = Literal["run", "train", "edit"]

# Need -> what it is and the option that gives it. What is not here, every comparison has.
OPTIONS = {
    "base": "the model before alignment: --unaligned MODEL",
    "borderline": "harmless requests that look dangerous: --borderline FILE",
    "harmful": "harmful answers: --harmful FILE",
    "preferences": "preferences: --preferences FILE",
}


@dataclass(frozen=True)
class Entrant:
    """A method that is to be compared.

    Attributes:
        about: what ``ssah.methods.describe`` says of it.
        method: with its settings.
        way: the model runs changed, is trained, or is edited and measured.
        subject: the model that it acts on.
        lacking: what it needs and does not have, as a row says it; None: it has everything.
        given: the names of its settings that are the user's.
    """

    about: dict[str, Any]
    method: Method
    way: Way
    subject: Literal["aligned", "tuned"]
    lacking: str | None
    given: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """Of the method."""
        return self.method.name

    @property
    def swept(self) -> bool:
        """Whether several strengths are tried: where none was given, and each costs an edit alone.

        What a strength of other methods would cost is said in docs/compare.md.
        """
        tried = self.way == "edit" and self.subject == "tuned" and bool(self.method.strengths)
        # A strength that is tried would overrule what the user has said of it in another way.
        return tried and self.given.isdisjoint({self.method.strength, *self.method.instead})

    @property
    def identity(self) -> dict[str, Any]:
        """What a row says of every method, whether it ran or not."""
        keys = ("paper", "stage", "aim", "departures")
        return {
            "method": self.name,
            **{key: self.about[key] for key in keys},
            "needs": list(self.about["needs"]),
        }


def lineup(
    chosen: Sequence[str], given: Collection[str], settings: Sequence[str] = ()
) -> list[Entrant]:
    """The methods in the order of the registry.

    Args:
        chosen: their names, or ``"all"``.
        given: of the needs that have an option, those that are there.
        settings: of methods, each as ``"sn-tune.share=0.1"``.

    Raises:
        ValueError: there is no such method or setting, a value is out of its bounds, or ``"all"``
            is named beside others.
    """
    for name in chosen:
        check_choice("methods", name, (ALL, *names()))
    if ALL in chosen and len(chosen) > 1:
        raise ValueError(f"methods is {' '.join(chosen)!r}; it must be {ALL}, or names alone")
    wanted = names() if ALL in chosen else [name for name in names() if name in chosen]
    own: dict[str, list[str]] = {}
    for text in settings:
        name, rest = _setting(text, wanted)
        own.setdefault(name, []).append(rest)
    return [_entrant(name, given, own.get(name, [])) for name in wanted]


def _setting(text: str, wanted: Sequence[str]) -> tuple[str, str]:
    """The method of ``METHOD.NAME=VALUE``, and ``NAME=VALUE``."""
    left, equals, _ = text.partition("=")
    name, dot, _ = left.partition(".")
    if not equals or not dot:
        raise ValueError(
            f"set is {text!r}; it must be METHOD.NAME=VALUE, sn-tune.share=0.1 for one"
        )
    check_choice("set: the method", name, wanted)
    return name, text.removeprefix(f"{name}.")


def _entrant(name: str, given: Collection[str], settings: Sequence[str]) -> Entrant:
    about, own = describe(name), typed_method(name, settings)
    after = "tuned" in own.needs
    way: Way = "train"
    if about["gives"] == "Changed":
        way = "run"
    elif about["gives"] == "Edited" and (after or own.aim == "remove"):
        way = "edit"
    missing = [OPTIONS[need] for need in own.needed if need in OPTIONS and need not in given]
    package = own.lacking_package()
    missing += [] if package is None else [package]
    return Entrant(
        about,
        own,
        way,
        "tuned" if after or way == "train" else "aligned",
        f"needs {'; '.join(missing)}" if missing else None,
        frozenset(text.partition("=")[0] for text in settings),
    )
