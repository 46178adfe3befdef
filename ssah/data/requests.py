"""Requests without answers: what a model is asked when its refusals are measured."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ssah.data.counts import Counts
from ssah.data.fields import Columns, DataError, check_count, check_request
from ssah.data.rows import Invalid, read, row_range


def load_requests(
    source: str | os.PathLike[str],
    limit: int | None = None,
    *,
    prompt_column: str | None = None,
    invalid: Invalid = "error",
    counts: Counts | None = None,
) -> list[str]:
    """Read requests, one string each.

    Args:
        source: one of
            a text file (`.txt`, UTF-8): one request a line, blank lines are skipped;
            a file as `load_rows` reads it, AdvBench's CSV for one: its prompts; no response is
            needed;
            `"builtin:safety_eval"` or the like, or a hub id, as `load_rows` takes them;
            any of these with a range, `"requests.txt[0:50]"`.
        limit: the number of requests to read, from the first; None reads all.
        prompt_column, invalid, counts: as `load_rows` takes them.

    Raises:
        DataError, FileNotFoundError, ValueError: as `load_rows`.

    Warns:
        UserWarning: requests repeat.
    """
    if limit is not None:  # here, because a text file is not read by `read`, which checks it too
        check_count("limit", limit)
    counts = Counts() if counts is None else counts
    name, rows = row_range(source)
    if Path(name).suffix == ".txt" and Path(name).is_file():
        requests = list(_lines(Path(name)))[slice(None) if rows is None else rows][:limit]
    else:
        column = None if str(name).startswith("builtin:") else prompt_column
        check = partial(check_request, columns=Columns(column))
        requests = list(read(source, check, None, limit, invalid, counts))
    if not requests:
        raise DataError(f"{source}: has no requests")
    counts.warn_of_repeated(str(source), requests)
    return requests


def _lines(path: Path) -> Iterator[str]:
    # As text files end lines: str.splitlines would also cut at U+2028 and form feeds.
    with path.open(encoding="utf-8-sig") as lines:
        yield from (text for line in lines if (text := line.strip()))
