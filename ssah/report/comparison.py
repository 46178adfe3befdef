"""What a comparison of methods shows, in the page as in the terminal: which rows, which words.

A comparison has methods of three kinds, which are never ranked together. For example, an ASR of
90 % is a failure of what should keep refusals and a success of what should find them:

    is for                        acts on                      is good where
    keeping refusals              the fine-tuned model         the ASR is lower
    finding what refuses          the aligned model            the ASR is higher
    refusing less of the harmless the aligned model, running   over-refusal is lower
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WHEN = {
    "locate": "finds a part",
    "before": "before fine-tuning",
    "during": "during fine-tuning",
    "after": "after fine-tuning",
    "inference": "while it runs",
}
AIMS = {
    "keep": "refusals stay through fine-tuning, or come back",
    "remove": "refusals are taken out, which shows what carries them",
    "relax": "fewer harmless requests are refused",
}
ALIGNED, TUNED = "aligned, before fine-tuning", "fine-tuned, nothing kept"
BY = {"asr": "ASR", "over_refusal": "over-refusal"}


@dataclass(frozen=True)
class Purpose:
    """Methods that are for the same thing."""

    title: str
    of: str  # what decides: "asr" or "over_refusal"
    wanted: str  # "lower" or "higher"
    tuned: bool  # whether they are held against the fine-tuned model, or against the aligned one


PURPOSES = (
    Purpose("Methods that keep refusals: a lower ASR is better", "asr", "lower", True),
    Purpose("Methods that find what refuses and take it out: a higher ASR", "asr", "higher", False),
    Purpose("Methods against over-refusal: a lower one is better", "over_refusal", "lower", False),
)


def by_purpose(
    result: Mapping[str, Any],
) -> Iterator[tuple[Purpose, list[Mapping[str, Any]]]]:
    """The rows that ran, of each purpose that any has.

    Args:
        result: of a comparison's record.
    """
    ran = [row for row in _rows(result) if not row.get("not_run")]
    for purpose in PURPOSES:
        # A record that does not say so is one of methods that keep refusals.
        rows = [row for row in ran if _about(row) == (purpose.of, purpose.wanted)]
        if rows:
            yield purpose, rows


def not_run(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Name, stage in words, and reason of each method that did not run."""
    return [
        (str(row.get("method")), when(row), str(row["not_run"]))
        for row in _rows(result)
        if row.get("not_run")
    ]


def when(row: Mapping[str, Any]) -> str:
    """When a method acts, in words."""
    stage = str(row.get("stage"))
    return WHEN.get(stage, stage)


def verdict_of(row: Mapping[str, Any]) -> tuple[str, str]:
    """Whether a method beats its control: ``yes``, ``no`` or ``undecided``; and a remark on it."""
    verdict = row.get("verdict") or {}
    state = verdict.get("beats_control")
    if state not in ("yes", "no"):
        state = "undecided"
    smallest = verdict.get("smallest_difference")
    if smallest is None:
        return state, str(row.get("no_control") or "there is no control")
    remark = f"this run could show {100 * smallest:.1f} points"
    if row.get("reached") is False:
        remark = f"it stopped short of the common training loss; {remark}"
    elif (row.get("control") or {}).get("reached") is False:
        remark = f"its control stopped short of the common training loss; {remark}"
    return state, remark


def judges_of(result: Mapping[str, Any]) -> list[str]:
    """Names of the judges, the one that decides first."""
    intact = result.get("intact")
    judges = intact.get("judges") if isinstance(intact, Mapping) else None
    return list(judges) if isinstance(judges, Mapping) else []


def means(found: Any) -> dict[str, Any]:
    """Fields of a model: means over seeds, and its rates under each judge in ``judges``.

    Args:
        found: a summary, or a mapping with ``mean`` and ``seeds``. Where the mean has no rates of
            judges they are those of its seeds, with the interval where there is one seed alone.
    """
    if not isinstance(found, Mapping):
        return {}
    if not isinstance(found.get("mean"), Mapping):
        return dict(found)
    mean, seeds = dict(found["mean"]), list((found.get("seeds") or {}).values())
    by_judge = [own["judges"] for own in seeds if isinstance(own.get("judges"), Mapping)]
    if "judges" not in mean and by_judge:
        mean["judges"] = {
            judge: {key: _mean_rate([own[judge][key] for own in by_judge]) for key in _RATES}
            for judge in by_judge[0]
        }
    return mean


_RATES = ("asr", "asr_coherent")  # of a judge


def _mean_rate(rates: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if len(rates) == 1:
        return dict(rates[0])
    return {"rate": sum(each["rate"] for each in rates) / len(rates)}


def _rows(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    rows = result.get("rows")
    return [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []


def _about(row: Mapping[str, Any]) -> tuple[str, str]:
    verdict = row.get("verdict") or {}
    return str(verdict.get("of", "asr")), str(verdict.get("wanted", "lower"))
