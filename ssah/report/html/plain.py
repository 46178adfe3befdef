"""Plain data as tables of text: what the report does with results that it does not know."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MISSING = "–"

# Fields that hold a fraction in [0, 1], by the last word of their name.
_SHARES = frozenset(
    {"asr", "coherent", "fraction", "incoherent", "jaccard", "kept", "rate", "refuses", "share"}
)
_INTERVAL = "interval"  # of a field ``x``: ``x_interval`` beside it, or ``interval`` in it
_VALUES = ("value", "mean", "rate", "difference", "median")  # what stands beside an ``interval``
_SHOWN = 8  # numbers of a list in a cell


@dataclass(frozen=True)
class Table:
    """Text in rows and columns."""

    title: str  # over the table; may be empty
    columns: tuple[str, ...]  # their names
    rows: tuple[tuple[str, ...], ...]  # as many cells each as there are columns
    names: int = 1  # how many of the first columns hold names; the others hold numbers
    note: str = ""  # below the table; may be empty


def number(value: Any, format_: str = "") -> str:
    """A value as text: numbers readable, a missing one as a dash.

    Args:
        value: of any type of JSON.
        format_: of a number, as ``format`` takes it; none: four digits, thousands apart.
    """
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        if format_ and math.isfinite(value):
            return format(value, format_)
        # A large float that is whole is a count which JSON has made a float.
        if isinstance(value, int) or (value == int(value) and abs(value) >= 1000):
            return f"{int(value):,}"
        return f"{value:.4g}"
    return str(value)


def share(value: Any) -> str:
    """A fraction as text, in per cent."""
    return number(value, ".1%")


def duration(seconds: Any) -> str:
    """Seconds as text, such as ``3 min 20 s``."""
    if not isinstance(seconds, int | float):
        return MISSING
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def is_interval(value: Any) -> bool:
    """Whether ``value`` is a pair of numbers, the first not above the second."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) == 2
        and all(isinstance(end, int | float) and not isinstance(end, bool) for end in value)
        and value[0] <= value[1]
    )


def with_interval(value: Any, interval: Any, format_: str = "") -> str:
    """A value followed by its interval, where there is one: ``3.1% [1.0, 9.2]``."""
    text = number(value, format_)
    return f"{text} {interval_text(interval, format_)}".rstrip()


def interval_text(interval: Any, format_: str = "") -> str:
    """An interval in brackets, without the % of its format; empty where there is none."""
    if not is_interval(interval):
        return ""
    low, high = (number(end, format_).removesuffix("%") for end in interval)
    return f"[{low}, {high}]"


def tables(data: Any, title: str = "") -> list[Table]:
    """Any plain data as tables: scalars in one, lists and mappings below them in others.

    A field ``x`` and its ``x_interval`` share a cell, as do ``value`` and ``interval``.
    """
    if isinstance(data, Mapping):
        return _of_mapping(data, title)
    if isinstance(data, Sequence) and not isinstance(data, str):
        if data and all(isinstance(row, Mapping) for row in data):
            return [_of_rows(list(data), title)]
        if data and all(_is_list(row) for row in data):
            return [_of_matrix(data, title)]
    return [Table(title, ("value",), ((_cell(title, data),),), names=0)]


def _of_mapping(data: Mapping[str, Any], title: str) -> list[Table]:
    scalars: dict[str, Any] = {}  # what one table of names and values holds
    rest: dict[str, Any] = {}  # what gets tables of its own
    for key, value in data.items():
        (scalars if _fits_a_cell(value) else rest)[key] = value
    found = []
    fields = _joined(scalars)
    if fields:
        rows = tuple((_words(key), text) for key, text in fields.items())
        texts = any(isinstance(scalars[key], str) for key in fields)
        found.append(Table(title, ("", "value"), rows, names=2 if texts else 1))
    for key, value in rest.items():
        name = f"{title}: {_words(key)}" if title else _words(key)
        if isinstance(value, Mapping) and value and all(map(_is_record, value.values())):
            # {"scu": {"asr": 0.1}, "ru": {"asr": 0.2}}: a row each, not a table each
            rows_ = [{"": inner, **record} for inner, record in value.items()]
            found.append(_of_rows(rows_, name))
        elif value:
            found += tables(value, name)
    return found


def _of_rows(records: Sequence[Mapping[str, Any]], title: str) -> Table:
    flat = [_joined(_flattened(record)) for record in records]
    columns = list(dict.fromkeys(key for row in flat for key in row))
    named = [key for key in columns if all(_is_name(r, key) for r in records)]
    # Names come first, wherever the record has them, so that the eye finds its row.
    columns = [*named, *(key for key in columns if key not in named)]
    rows = tuple(tuple(row.get(key, MISSING) for key in columns) for row in flat)
    return Table(title, tuple(_words(key) for key in columns), rows, names=len(named))


def _of_matrix(rows: Sequence[Sequence[Any]], title: str) -> Table:
    width = max(len(row) for row in rows)
    cells = tuple(
        (str(i), *(number(v) for v in row), *[MISSING] * (width - len(row)))
        for i, row in enumerate(rows)
    )
    return Table(title, ("", *(str(j) for j in range(width))), cells)


def _flattened(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in record.items():
        name = f"{prefix}{key}"
        if _fits_a_cell(value) or not isinstance(value, Mapping):
            flat[name] = value
        else:
            flat |= _flattened(value, f"{name} ")
    return flat


def _joined(fields: Mapping[str, Any]) -> dict[str, str]:
    """Cells of fields; an interval stands in the cell of its value."""
    cells = {}
    for key, value in fields.items():
        base = key.removesuffix(f"_{_INTERVAL}")
        if base != key and base in fields and is_interval(value):
            continue  # it stands in the cell of its value
        interval = fields.get(f"{key}_{_INTERVAL}")
        if is_interval(interval) and _is_number(value):
            cells[key] = with_interval(value, interval, _format(key))
        else:
            cells[key] = _cell(key, value)
    return cells


def _cell(key: str, value: Any) -> str:
    # a whole number under the name of a share is a count, of requests for one
    format_ = "" if isinstance(value, int) else _format(key)
    if is_interval(value) and _INTERVAL in key:
        return interval_text(value, format_) + (" %" if format_ else "")
    if isinstance(value, Mapping):
        name = next((name for name in _VALUES if name in value), None)
        if name is None:
            return MISSING if not value else ", ".join(f"{k} {number(v)}" for k, v in value.items())
        inner = format_ or _format(name)
        return with_interval(value[name], value.get(_INTERVAL), inner)
    if _is_list(value):
        if not value:
            return MISSING
        shown = ", ".join(number(v, format_) for v in value[:_SHOWN] if not _is_deep(v))
        more = f", … ({len(value)} values)" if len(value) > _SHOWN else ""
        return f"{shown}{more}" if shown else f"{len(value)} values"
    return number(value, format_)


def _format(key: str) -> str:
    words = key.replace("_", " ").replace("-", " ").lower().split()
    return ".1%" if words and _SHARES & {words[-1], words[0]} else ""


def _words(key: str) -> str:
    return str(key).replace("_", " ")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_deep(value: Any) -> bool:
    return isinstance(value, Mapping) or _is_list(value)


def _is_measured(value: Any) -> bool:
    """A value with its interval."""
    return (
        isinstance(value, Mapping)
        and _INTERVAL in value
        and any(name in value for name in _VALUES)
        and not any(_is_deep(v) and not is_interval(v) for v in value.values())
    )


def _fits_a_cell(value: Any) -> bool:
    if isinstance(value, Mapping):
        return _is_measured(value)
    return not _is_list(value) or not any(_is_deep(v) for v in value)


def _is_record(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value)


def _is_name(record: Mapping[str, Any], key: str) -> bool:
    value = record.get(key)
    return isinstance(value, str) or (value is None and key in record)
