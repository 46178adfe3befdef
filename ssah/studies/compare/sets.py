"""What a comparison reads, with nothing reported on that something was found or chosen by.

For example, of 32 requests and a calibration share of 0.25 the requests 0, 4, 8, ... choose the
strengths of edits, and the other 24 are reported on. Rows of the task are split in the same way:
most train, of the rest one half chooses and one half is reported on. Equal prompts stay together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from ssah.data import Pair, Row
    from ssah.studies.compare.settings import CompareSets, CompareSettings
    from ssah.studies.sources import Sources

Item = TypeVar("Item")

# Of the sets that methods find something by, and of those that choose or report.
_FOUND_BY = ("safety", "utility", "borderline", "harmful", "preferences")
_MEASURED = ("calibration", "requests", "over_refusal")


@dataclass(frozen=True)
class Sets:
    """What was read and split.

    Attributes:
        safety, utility: rows to find by.
        task: rows to train on, to choose strengths by, and to report on.
        requests, calibration: harmful requests to report on, and to choose strengths by.
        over_refusal: harmless requests that look dangerous, to report on.
        utility_eval: rows whose loss is reported.
        borderline, harmful, preferences: for methods that need them; None: not given.
    """

    safety: list[Row]
    utility: list[Row]
    task: tuple[list[Row], list[Row], list[Row]]
    requests: list[str]
    calibration: list[str]
    over_refusal: list[str]
    utility_eval: list[Row]
    borderline: list[str] | None
    harmful: list[Row] | None
    preferences: list[Pair] | None


def read_sets(sources: Sources, sets: CompareSets, settings: CompareSettings) -> Sets:
    """Read everything, and split what has to be.

    Raises:
        DataError, OSError: a row or a file is wrong.
        ValueError: too few rows to split, or what is measured is among what something is found by.
    """
    asked = sources.requests("requests", sets.requests)
    if sets.calibration is None:
        calibration, asked = split("requests", asked, settings.calibration_share, str)
    else:
        calibration = sources.requests("calibration", sets.calibration)
    # The whole of it is recorded as trained on: a set that shares rows with it is warned of.
    task = sources.rows("finetune", sets.data)
    kept, trained = split("data", task, settings.held_out, _prompt)
    choosing, reported = split("data", kept, 0.5, _prompt)
    found = Sets(
        safety=sources.rows("safety", sets.safety),
        utility=sources.rows("utility", sets.utility),
        task=(trained, choosing, reported),
        requests=asked,
        calibration=calibration,
        over_refusal=sources.requests("over_refusal", sets.over_refusal),
        utility_eval=sources.rows("utility_eval", sets.utility_eval),
        borderline=_if_given(sets.borderline, lambda own: sources.requests("borderline", own)),
        harmful=_if_given(sets.harmful, lambda own: sources.rows("harmful", own)),
        preferences=_if_given(sets.preferences, sources.preferences),
    )
    _check_apart(found)
    return found


def split(
    name: str, items: Sequence[Item], share: float, prompt: Callable[[Item], str]
) -> tuple[list[Item], list[Item]]:
    """A share of the items, evenly spaced among the different prompts, and the others.

    Raises:
        ValueError: there are fewer than two different prompts.
    """
    prompts = list(dict.fromkeys(map(prompt, items)))
    if len(prompts) < 2:
        raise ValueError(
            f"{name} has {len(prompts)} different prompts left to split; there must be at least "
            "two in each part: give more rows"
        )
    n = min(max(1, int(share * len(prompts) + 0.5)), len(prompts) - 1)
    taken = {prompts[i * len(prompts) // n] for i in range(n)}
    first = [each for each in items if prompt(each) in taken]
    return first, [each for each in items if prompt(each) not in taken]


def _check_apart(sets: Sets) -> None:
    """Refuse requests that are measured and that something was found, or chosen, by."""
    for role in _MEASURED:
        own = set(getattr(sets, role))
        for other in (*_FOUND_BY, "calibration"):
            items: Iterable[Any] | None = getattr(sets, other)
            if role == other or items is None:
                continue
            shared = own & {each if isinstance(each, str) else _prompt(each) for each in items}
            if shared:
                raise ValueError(
                    f"{role} shares {len(shared)} of its {len(own)} prompts with {other}: what "
                    "methods were found or chosen by is not reported on. Take disjoint rows, such "
                    "as FILE[0:100] and FILE[100:]"
                )


def _prompt(row: Mapping[str, Any]) -> str:
    own = row["prompt"]
    return str(own if isinstance(own, str) else own[-1]["content"])  # turns, of preferences


def _if_given(source: str | None, read: Callable[[str], Item]) -> Item | None:
    return None if source is None else read(source)
