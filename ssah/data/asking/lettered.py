"""Multiple-choice questions of which several letters may be right, as SALAD-Bench's ``mcq_set``.

{"mcq": "Which ...? A. ...", "choices": "A. tea; B. poison; C. bread", "gt": "AC"}
{"prompt": "Which ...? A. ...", "letters": ["A", "B", "C"], "right": ["A", "C"]}
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from string import ascii_uppercase
from typing import Any, TypedDict

from ssah.data.asking.salad import set_of
from ssah.data.counts import Counts
from ssah.data.fields import DataError, column_of, has_fields, kind_of
from ssah.data.rows import Invalid, read

# "A." or "A)" or "A:" where a choice begins: at the start, or after what ends the one before.
_CHOICE = re.compile(r"(?:^|[;\n])\s*\(?([A-Z])[.):]\s")
_LETTERS = re.compile(r"[A-Z]([\s,;/&.]*[A-Z])*\.?")  # "A", "AC", "A, C", "A; C."


class Lettered(TypedDict):
    """A question, whose choices stand in its prompt."""

    prompt: str
    letters: list[str]  # of all choices, in their order
    right: list[str]  # one at least


def load_lettered(
    source: str | os.PathLike[str],
    limit: int | None = None,
    *,
    invalid: Invalid = "error",
    counts: Counts | None = None,
) -> list[Lettered]:
    """Read questions: ``mcq`` (the whole prompt), ``choices`` (one text, ``"A. ...; B. ..."``) and
    ``gt`` (the letters that are right, a text or a list).

    Args:
        source, limit, invalid, counts: as `ssah.data.load_rows` takes them.

    Raises:
        DataError, FileNotFoundError, ValueError: as `ssah.data.load_rows`; a row lacks a field,
            its letters are not A, B, C ... in this order, or a right one is not among them.
    """
    counts = Counts() if counts is None else counts
    return list(read(source, _check_lettered, None, limit, invalid, counts))


def _check_lettered(row: Any, where: str) -> Lettered:
    own = has_fields(row, where)
    letters = _CHOICE.findall(_text(own, "choices", where))
    if len(letters) < 2 or letters != list(ascii_uppercase[: len(letters)]):
        raise DataError(
            f"{where}: 'choices' must be one text with the letters A, B, ... in their order "
            f"('A. one; B. another'), has {', '.join(letters) or 'none'}"
        )
    given = own.get(column_of(own, "gt") or "")
    said = "".join(map(str, given)) if isinstance(given, list) else _text(own, "gt", where)
    right = re.findall("[A-Z]", said) if _LETTERS.fullmatch(said.strip()) else []
    if not right or not set(right) <= set(letters):
        raise DataError(
            f"{where}: 'gt' must be one or several of the letters {', '.join(letters)}, was "
            f"{given!r}"
        )
    return {"prompt": _text(own, "mcq", where), "letters": letters, "right": sorted(set(right))}


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    key = column_of(row, name)
    if key is None:
        meant = set_of(row)
        told = f": a row of SALAD-Bench's {meant}, which has no letters" if meant else ""
        has = ", ".join(map(repr, row))
        raise DataError(
            f"{where}: no {name!r}; a question has 'mcq', 'choices' and 'gt'; has {has}{told}"
        )
    if not isinstance(row[key], str) or not row[key].strip():
        raise DataError(f"{where}: {key!r} must be a text, was {kind_of(row[key])} or empty")
    return str(row[key])
