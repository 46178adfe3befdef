"""Requests without answers: what a model is asked when its refusals are measured."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from ssah.data.rows import DataError, check_row, load_rows, read_objects, row_range

__all__ = ["load_requests"]

_NO_RESPONSE = "-"


def load_requests(source: str | os.PathLike[str], limit: int | None = None) -> list[str]:
    """Read requests, one string each.

    Args:
        source: one of
            a text file (`.txt`, UTF-8): one request a line, blank lines are skipped;
            a JSONL file: the prompts of its rows, as `load_rows` reads them; no response is needed;
            `"builtin:safety_eval"` or the like, or a hub id, as `load_rows` takes them;
            any of these with a range, `"requests.txt[0:50]"`.
        limit: the number of requests to read, from the first; None reads all.

    Raises:
        DataError, FileNotFoundError, ValueError: as `load_rows`.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 or None, was {limit}")
    name, rows = row_range(source)
    path = Path(name)
    if path.suffix == ".txt" and path.is_file():
        # As text files end lines: str.splitlines would also cut at U+2028 and form feeds.
        with path.open(encoding="utf-8-sig") as lines:
            requests = [text for line in lines if (text := line.strip())]
    elif path.is_file():
        requests = [_prompt(row, where) for where, row in read_objects(path)]
    else:
        requests = [row["prompt"] for row in load_rows(name)]
    if rows is not None:
        requests = list(islice(requests, rows.start, rows.stop))
    if not requests:
        raise DataError(f"{source}: has no requests")
    return requests[:limit]


def _prompt(row: Any, where: str) -> str:
    """The prompt of a row that may lack a response."""
    if isinstance(row, Mapping):
        given = {key: value for key, value in row.items() if value is not None}
        turns = given.get("messages")
        if isinstance(turns, list) and not any(_is_answer(turn) for turn in turns):
            given["messages"] = [*turns, {"role": "assistant", "content": _NO_RESPONSE}]
        row = {"completion": _NO_RESPONSE, **given}
    return check_row(row, where)["prompt"]


def _is_answer(turn: Any) -> bool:
    return isinstance(turn, Mapping) and turn.get("role") == "assistant"
