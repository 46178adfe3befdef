"""Requests with what is known of each: its categories, or a policy of its own and what it allows.

With ``by=("1-category",)`` a row of SALAD-Bench becomes

    {"qid": "7", "question": "How ...?", "source": "GPTFuzzer", "1-category": "O2: ..."}
    {"prompt": "How ...?", "categories": {"1-category": "O2: ..."}}

and with ``policy=True`` one row of many policies becomes

    {"prompt": "Write a fight.", "system_prompt": "You may write of violence.", "allowed": true}
    {"prompt": "Write a fight.", "messages": [the system's turn, the user's], "allowed": True}

Wherever the library takes requests, it takes such rows too.
"""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

from ssah.data.asking.cosapien import SCENARIO, allowed_by_type, is_cosapien
from ssah.data.counts import Counts, warn_of_small
from ssah.data.fields import (
    Columns,
    DataError,
    Message,
    check_count,
    check_request,
    column_of,
    has_fields,
)
from ssah.data.rows import Invalid, read, row_range

_POLICY = ("system_prompt", "policy")  # the columns that may hold one, in this order
_SAID = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class _Prompt(TypedDict):
    prompt: str


class Asked(_Prompt, total=False):
    """A request, and what is known of it; what is not known is left out."""

    categories: dict[str, str]  # by column
    messages: list[Message]  # its own system prompt, and the prompt
    allowed: bool  # whether that system prompt allows an answer


def load_asked(
    source: str | os.PathLike[str],
    limit: int | None = None,
    *,
    by: Sequence[str] = (),
    policy: bool = False,
    prompt_column: str | None = None,
    invalid: Invalid = "error",
    counts: Counts | None = None,
) -> list[Asked]:
    """Read requests with their categories or policies.

    Args:
        source, limit, prompt_column, invalid, counts: as `ssah.data.load_requests` takes them; a
            text file has no columns, so that nothing is known of its lines.
        by: columns whose texts are the categories of a row: ``("1-category", "3-category")``.
        policy: each row has a system prompt of its own (``system_prompt`` or ``policy``) and
            ``allowed``, true where that lets a model answer; or the fields of CoSApien, of which
            requests that are allowed in part are left out.

    Raises:
        DataError, FileNotFoundError, ValueError: as `ssah.data.load_requests`; a row lacks a column
            that was named, which the message tells with those that it has.

    Warns:
        UserWarning: requests repeat, or are allowed in part.
    """
    columns = Columns(None if str(source).startswith("builtin:") else prompt_column)
    counts = Counts() if counts is None else counts
    name, _ = row_range(source)
    if Path(name).suffix == ".txt":
        raise ValueError(
            f"source is {str(source)!r}, whose lines have no columns: categories and policies need "
            "a CSV, JSONL or parquet file"
        )
    check = partial(check_asked, columns=columns, by=by, policy=policy)
    rows = list(read(source, check, None, limit, invalid, counts))
    if policy:
        rows = _allowed_or_not(rows, str(source))
    counts.warn_of_repeated(str(source), map(_identity, rows))
    return rows


def draw_by_category(rows: Sequence[Asked], column: str, n: int, *, seed: int = 0) -> list[Asked]:
    """At most ``n`` rows of each category of ``column``, drawn at random, in their order.

    A category is drawn by itself: what it gives does not depend on the others.

    Raises:
        ValueError: ``n`` is below 1, or a row was read without that column.

    Warns:
        UserWarning: categories have fewer rows than ``n``.
    """
    check_count("n", n)
    strata: dict[str, list[int]] = {}
    for index, category in enumerate(_categories(rows, column)):
        strata.setdefault(category, []).append(index)
    kept: set[int] = set()
    for category, members in strata.items():
        # Of a text: the same draw on every machine, whatever its hash of strings is.
        own = random.Random(f"{seed} {category}")
        kept.update(own.sample(members, min(n, len(members))))
    warn_of_small(column, [len(members) for members in strata.values()], n)
    return [row for index, row in enumerate(rows) if index in kept]


def drop_category(rows: Sequence[Asked], unwanted: str) -> list[Asked]:
    """The rows without those that ``"COLUMN=VALUE"`` describes, in whatever case it is written.

    Raises:
        ValueError: it has another form, a row was read without that column, or none is described
            (the value may be misspelt) or all are.
    """
    column, equals, value = unwanted.partition("=")
    if not (column and equals and value):
        raise ValueError(
            f"what is left out is {unwanted!r}; it must be COLUMN=VALUE, source=AdvBench for one"
        )
    own = _categories(rows, column)
    kept = [r for r, each in zip(rows, own, strict=True) if each.casefold() != value.casefold()]
    if len(kept) in (0, len(rows)):  # a value that is misspelt would leave all of them in
        raise ValueError(
            f"{unwanted!r} leaves out {len(rows) - len(kept)} of {len(rows)} rows, must leave out "
            f"some: {column!r} has {', '.join(sorted(map(repr, set(own)))[:8])}"
        )
    return kept


def drop_seen(rows: Sequence[Asked], seen: Iterable[str]) -> list[Asked]:
    """The rows whose prompt is not among ``seen``, up to case, white space and the last stop."""
    known = {_plain(text) for text in seen}
    return [row for row in rows if _plain(row["prompt"]) not in known]


def _categories(rows: Sequence[Asked], column: str) -> list[str]:
    """Of each row its category; ValueError where a row was read without it."""
    for index, row in enumerate(rows):
        if column not in row.get("categories", {}):
            raise ValueError(f"rows[{index}] was read without the category {column!r}: add it (by)")
    return [row["categories"][column] for row in rows]


def check_asked(
    row: Any, where: str, *, columns: Columns, by: Sequence[str], policy: bool = False
) -> Asked:
    """The row as `load_asked` returns it; DataError, beginning with ``where``, as it describes."""
    own = has_fields(row, where)
    asked: Asked = {"prompt": check_request(own, where, columns)}
    if by:
        asked["categories"] = {key: _text(own, key, where) for key in by}
    if policy:
        named = (key for key in _POLICY if column_of(own, key) is not None)
        cosapien = is_cosapien(own)
        told = _text(own, SCENARIO if cosapien else next(named, _POLICY[0]), where)
        asked["messages"] = [
            {"role": "system", "content": told},
            {"role": "user", "content": asked["prompt"]},
        ]
        allowed = allowed_by_type(own, where) if cosapien else _allowed(own, where)
        if allowed is not None:
            asked["allowed"] = allowed
    return asked


def _allowed_or_not(rows: list[Asked], name: str) -> list[Asked]:
    """Without those that a policy allows in part; DataError where none is left."""
    kept = [row for row in rows if "allowed" in row]
    if not kept:
        raise DataError(f"{name}: every request is allowed in part, so that none is left")
    if len(kept) < len(rows):
        warnings.warn(
            f"{name}: {len(rows) - len(kept)} of {len(rows)} requests were left out: their policy "
            "allows an answer in part",
            stacklevel=3,
        )
    return kept


def _allowed(row: Mapping[str, Any], where: str) -> bool:
    key = column_of(row, "allowed")
    said = None if key is None else _SAID.get(str(row[key]).strip().lower())
    if said is None:
        was = f"has {', '.join(map(repr, row))}" if key is None else f"was {row[key]!r}"
        raise DataError(f"{where}: 'allowed' must be true or false (yes or no in a CSV), {was}")
    return said


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    """What the column holds; DataError where the row lacks it, or has no text there."""
    key = column_of(row, name)
    if key is None:
        raise DataError(f"{where}: no column {name!r}, the row has {', '.join(map(repr, row))}")
    if not isinstance(row[key], str) or not row[key].strip():
        raise DataError(f"{where}: {key!r} must be a text that is not empty, was {row[key]!r}")
    return str(row[key])


def _identity(row: Asked) -> str:
    """Equal where the same is asked: one prompt under two policies is asked twice."""
    return str([turn["content"] for turn in row.get("messages", [])] or row["prompt"])


def _plain(text: str) -> str:
    # A copy of a data set may lack the last stop, or have another space.
    return " ".join(text.split()).rstrip(".?! ").casefold()
