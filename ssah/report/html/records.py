"""Records of measurements as tables: what the tables of all kinds of experiment are made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ssah.report.html.plain import Table, number, tables, with_interval

# What is measured of a model: name of the column, field, format.
MEASURED = (
    ("utility loss", "utility_loss", ".3f"),
    ("rise", "loss_rise", "+.3f"),
    ("margin", "refusal_margin", "+.2f"),
    ("refuses", "refuses", ".1%"),
    ("ASR", "asr", ".1%"),
    ("ASR, coherent", "asr_coherent", ".1%"),
    ("incoherent", "incoherent", ".1%"),
    ("tokens", "mean_tokens", ".0f"),
    ("maths loss", "math_loss", ".3f"),
    ("training loss", "training_loss", ".3f"),
)
MARGIN_NOTE = (
    "Loss: nats per token of ordinary answers. Margin: nats per token, above 0 the model would "
    "rather refuse; refuses: share of requests with a margin above 0."
)
MEASURED_NOTE = (
    f"{MARGIN_NOTE} ASR: share of harmful requests that are not refused; incoherent: share of "
    "these answers that are babble."
)
UNITS = ("units", "units", "")
SHARE = ("share", "share", ".2%")


def records_table(
    title: str,
    records: Iterable[Mapping[str, Any]],
    names: Sequence[tuple[str, str]],
    values: Sequence[tuple[str, str, str]],
    note: str = "",
) -> Table:
    """A table with a row per record; columns in which no record has anything are left out.

    Args:
        title: of the table.
        records: plain data. A field ``x`` may have its interval in ``x_interval``, or be a mapping
            with ``rate`` and ``interval``.
        names: name of the column and field, of text.
        values: name of the column, field and format, of numbers.
        note: below the table.
    """
    rows = [record for record in records if isinstance(record, Mapping)]
    # What an older version did not measure is a column too few, not a column of dashes.
    known = {key for row in rows for key, value in row.items() if value is not None}
    names = [column for column in names if column[1] in known]
    used = [column for column in values if column[1] in known]
    cells = tuple(
        (
            *(_name(row.get(key)) for _, key in names),
            *(_measured(row, key, format_) for _, key, format_ in used),
        )
        for row in rows
    )
    columns = (*(name for name, _ in names), *(name for name, _, _ in used))
    return Table(title, columns, cells, names=len(names), note=note)


def with_rows(*tables: Table) -> list[Table]:
    """The tables in which anything stands."""
    return [table for table in tables if table.rows]


# Factor and format of a claim's value.
_IN_UNITS = {"points": (100.0, "+.1f"), "nats": (1.0, "+.3f"), "cosine": (1.0, "+.3f")}


def in_unit(record: Mapping[str, Any]) -> dict[str, str]:
    """``shown``: the ``value`` of a record with its ``interval``, in its ``unit``.

    Of a rate, in [0, 1], the unit is ``points``: of 100.
    """
    unit = str(record.get("unit", ""))
    factor, format_ = _IN_UNITS.get(unit, (1.0, ""))
    value, interval = (_scaled(record.get(key), factor) for key in ("value", "interval"))
    return {"shown": f"{with_interval(value, interval, format_)} {unit}".strip()}


def _scaled(value: Any, factor: float) -> Any:
    if isinstance(value, list):  # the two ends of an interval
        return [_scaled(each, factor) for each in value]
    # With factor 1 a whole number stays one, and is shown without a decimal point.
    return factor * value if isinstance(value, int | float) and factor != 1 else value


def _name(value: Any) -> str:
    return number(value) if not isinstance(value, float) else f"{value:g}"


def _measured(record: Mapping[str, Any], key: str, format_: str) -> str:
    value = record.get(key)
    if isinstance(value, Mapping):
        return with_interval(value.get("rate"), value.get("interval"), format_)
    return with_interval(value, record.get(f"{key}_interval"), format_)


def list_of(data: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """The records of a list; none where there is no list."""
    found = data.get(key)
    return [row for row in found if isinstance(row, Mapping)] if isinstance(found, list) else []


def mapping_of(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A mapping in a mapping; an empty one where there is none."""
    found = data.get(key)
    return found if isinstance(found, Mapping) else {}


def generic(data: Mapping[str, Any], *without: str) -> list[Table]:
    """Tables of anything, but for the claims and for what has a table of its own."""
    rest = {key: value for key, value in data.items() if key not in (*without, "claims")}
    found = tables(rest) if rest else []
    if found and without and not found[0].title:  # what is left over stands below other tables
        found[0] = replace(found[0], title="Other figures")
    return found
