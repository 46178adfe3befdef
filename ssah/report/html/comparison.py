"""The section of ``ssah compare``: the recommendation, and a sortable table for each purpose.

A method is a group of two rows, so that its control stays with it however the table is sorted:

    method            beats its control?   less its control   ASR
    sppft             yes                  -20.0 [-28, -12]   20.0 % [14, 27]
      its control                                             40.0 % [33, 48]

What a record lacks is a dash.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ssah.report.comparison import (
    ALIGNED,
    BY,
    TUNED,
    Purpose,
    by_purpose,
    judges_of,
    means,
    not_run,
    verdict_of,
    when,
)
from ssah.report.html.plain import MISSING, Table, duration, interval_text, number, tables
from ssah.report.html.records import (
    generic,
    in_unit,
    list_of,
    mapping_of,
    records_table,
    with_rows,
)


@dataclass(frozen=True)
class Cell:
    """A value of one model."""

    text: str
    below: str = ""  # in small letters: its interval, or what it is made of
    order: str = ""  # the number to sort by; empty: it stands last


@dataclass(frozen=True)
class Line:
    """A method with its control, or a model to hold them against."""

    name: str
    about: str = ""  # when it acts
    recommended: bool = False
    state: str = ""  # of the verdict: "yes", "no" or "undecided"; empty for a model without one
    remark: str = ""  # on the verdict
    cells: Sequence[Cell] = ()
    control: str = ""  # what its control is; empty without one
    control_cells: Sequence[Cell] = ()
    facts: Sequence[tuple[str, str]] = ()  # in the fold-out: paper, departures, settings


@dataclass(frozen=True)
class Ranking:
    """Methods that are for the same thing."""

    title: str
    columns: Sequence[str]  # of the cells
    baselines: Sequence[Line]  # which are not sorted
    methods: Sequence[Line]


@dataclass(frozen=True)
class Comparison:
    """All that the page shows of a comparison beside the tables of every kind of run."""

    sentence: str  # the recommendation
    justified: bool  # whether it names a method
    rule: str  # what the verdicts mean; may be empty
    rankings: Sequence[Ranking]
    not_run: Sequence[tuple[str, str, str]]  # method, when it acts, why it did not run


def comparison(result: Mapping[str, Any]) -> Comparison:
    """The section of a comparison's result."""
    recommended = mapping_of(result, "recommendation")
    return Comparison(
        sentence=str(recommended.get("sentence") or "Nothing is recommended: there is no result."),
        justified=recommended.get("method") is not None,
        rule=str(recommended.get("rule") or ""),
        rankings=[_ranking(result, purpose, rows) for purpose, rows in by_purpose(result)],
        not_run=not_run(result),
    )


def _ranking(
    result: Mapping[str, Any], purpose: Purpose, rows: Iterable[Mapping[str, Any]]
) -> Ranking:
    judges, recommended = judges_of(result), mapping_of(result, "recommendation").get("method")
    models = {ALIGNED: result.get("intact")}
    if purpose.tuned:
        models[TUNED] = result.get("tuned")
    return Ranking(
        title=purpose.title,
        columns=[
            f"{BY[purpose.of]} less its control's",
            *(f"ASR, {judge}" for judge in judges),
            *(name for name, _, _ in _MEASURED),
            *_LAST,
        ],
        baselines=[
            Line(name, cells=[Cell(""), *_measured(means(model), judges), *_NOTHING])
            for name, model in models.items()
        ],
        methods=[
            _line(row, purpose, judges, recommended=row.get("method") == recommended)
            for row in rows
        ],
    )


# Heading, field, format.
_MEASURED = (
    ("ASR, coherent", "asr_coherent", ".1%"),
    ("over-refusal", "over_refusal", ".1%"),
    ("utility loss", "utility_loss", ".3f"),
    ("task loss", "task_loss", ".3f"),
    ("KL to aligned", "kl", ".3f"),
)
_LAST = ("weights touched", "cost", "frozen bits")
_NOTHING = (Cell(""),) * len(_LAST)


def _line(
    row: Mapping[str, Any], purpose: Purpose, judges: Sequence[str], *, recommended: bool
) -> Line:
    state, remark = verdict_of(row)
    difference = mapping_of(mapping_of(mapping_of(row, "differences"), "control"), purpose.of)
    control = mapping_of(row, "control")
    share, exact = row.get("share"), row.get("exact")
    last = [
        Cell(number(share, ".2%"), order=_order(share)),
        _cost(mapping_of(row, "cost")),
        Cell("verified" if exact == "verified" else MISSING, order="1" if exact else ""),
    ]
    beside = _measured(means(control), judges) if control else []
    return Line(
        name=str(row.get("method")),
        about=when(row),
        recommended=recommended,
        state=state,
        remark=remark,
        cells=[_points(difference), *_measured(means(row), judges), *last],
        control=f"control: {control.get('against')}" if control else "",
        control_cells=[Cell(""), *beside, *_NOTHING] if control else [],
        facts=list(_facts(row)),
    )


def _measured(model: Mapping[str, Any], judges: Sequence[str]) -> list[Cell]:
    """Cells of a model: its ASR under each judge, and what else was measured."""
    cells = []
    for place, judge in enumerate(judges):
        rate = mapping_of(mapping_of(mapping_of(model, "judges"), judge), "asr")
        # Over several seeds the judge that decides has its interval beside its mean.
        interval = rate.get("interval") or (None if place else model.get("asr_interval"))
        cells.append(_cell(rate.get("rate"), interval, ".1%"))
    for _, key, form in _MEASURED:
        cells.append(_cell(model.get(key), model.get(f"{key}_interval"), form))
    return cells


def _cell(value: Any, interval: Any, form: str) -> Cell:
    return Cell(number(value, form), interval_text(interval, form), _order(value))


def _points(difference: Mapping[str, Any]) -> Cell:
    if not difference:
        return Cell(MISSING)
    value, interval = difference.get("value"), difference.get("interval")
    return Cell(
        f"{number(value, '+.1%').removesuffix('%')} points",
        interval_text(interval, "+.1%"),
        _order(value),
    )


def _cost(cost: Mapping[str, Any]) -> Cell:
    """Seconds of all that was done, and the memory that it took."""
    spent = [cost[key] for key in _SPENT if cost.get(key) is not None]
    total, memory = sum(spent) if spent else None, cost.get("peak_memory_bytes")
    below = "" if memory is None else f"{memory / 2**30:.1f} GiB"
    return Cell(duration(total), below, _order(total))


def _cost_in_full(cost: Mapping[str, Any]) -> str:
    """What the seconds of a cell are made of, and what a cell has no room for."""
    parts = [
        f"{name} {duration(cost[key])}" for key, name in _SPENT.items() if cost.get(key) is not None
    ]
    if cost.get("updates") is not None:
        parts.append(f"{number(cost['updates'])} updates")
    if cost.get("seconds_per_token_ratio") is not None:
        parts.append(f"{cost['seconds_per_token_ratio']:.2f} times the time of a token")
    return ", ".join(parts)


_SPENT = {"find_seconds": "find", "train_seconds": "train", "apply_seconds": "apply"}


def _order(value: Any) -> str:
    number_ = isinstance(value, int | float) and math.isfinite(value)
    return repr(float(value)) if number_ else ""


def _facts(row: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    yield "paper", str(row.get("paper"))
    yield "departures", " ".join(map(str, row.get("departures") or ())) or "none"
    yield "needs", ", ".join(map(str, row.get("needs") or ())) or "nothing"
    chosen = _CHOSEN.get(str(row.get("chosen_on")), "")
    for title, key in ((f"settings{chosen}", "settings"), ("found", "facts")):
        scalars = [table for table in tables(mapping_of(row, key)) if not table.title]
        text = ", ".join(f"{name} {value}" for table in scalars for name, value in table.rows)
        if text:
            yield title, text
    yield "cost", _cost_in_full(mapping_of(row, "cost")) or MISSING


_CHOSEN = {
    "calibration": ", chosen on the calibration split",
    "given": ", given",
    "defaults": ", the paper's",
}


def comparison_tables(result: Mapping[str, Any]) -> list[Table]:
    """The tables below the rankings: strengths tried, every seed, and all paired differences."""
    curves, seeds, differences = [], [], []
    for row in list_of(result, "rows"):
        method = {"method": row.get("method")}
        for point in list_of(row, "curve"):
            control = mapping_of(point, "control")
            curves.append({**method, **point, **{f"control {k}": v for k, v in control.items()}})
        for model, of in (("method", row), ("control", mapping_of(row, "control"))):
            for seed, own in mapping_of(of, "seeds").items():
                seeds.append({**method, "model": model, "seed": seed, **own})
        for against, less in _AGAINST.items():
            for what, own in mapping_of(mapping_of(row, "differences"), against).items():
                named = {**method, "less": less, "of": BY.get(what, what.replace("_", " "))}
                differences.append({**named, **in_unit(own)})
    names = [("method", "method"), ("", "model"), ("seed", "seed")]
    found = [
        records_table("Strengths that were tried, on the calibration split", curves, *_CURVES),
        records_table("Every seed", seeds, names, [*_RATES, *_MEASURED], _NOTE),
        records_table(
            "Differences, paired over requests or rows, and seeds",
            differences,
            [("method", "method"), ("less", "less"), ("of", "of")],
            [("difference", "shown", "")],
        ),
    ]
    known = ("intact", "tuned", "rows", "recommendation")
    return [*with_rows(*found), *generic(result, *known)]


_AGAINST = {"control": "its control", "none": "nothing done"}
_RATES = (("ASR", "asr", ".1%"),)
_CURVES = (
    [("method", "method"), ("strength", "strength"), ("chosen", "chosen")],
    [
        (f"{prefix}{name}", f"{prefix}{key}", form)
        for prefix in ("", "control ")
        for name, key, form in (*_RATES, *_MEASURED)
    ],
)
_NOTE = (
    "ASR: share of harmful requests that are not refused; coherent: and whose answer is no babble. "
    "Losses and KL in nats per token, on rows that nothing was trained on."
)
