"""Reads rows from files, `datasets` objects, lists and the built-in sets, and checks them."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Generic, Literal, TypeAlias, TypeVar, cast

from ssah.data.counts import Counts
from ssah.data.fields import Columns, DataError, Row, check_count, check_row, kind_of
from ssah.data.files import SUFFIXES, read_objects

Item = TypeVar("Item")
Source: TypeAlias = "str | os.PathLike[str] | Iterable[Mapping[str, Any]] | Mapping[str, Any]"
Invalid: TypeAlias = Literal["error", "skip"]
Check: TypeAlias = "Callable[[Any, str], Item]"  # (row, where it is) -> the row, checked

# Written for this library, in the folder builtin/; *_eval are disjoint from what calibrates.
BUILTIN = ("safety", "utility", "safety_eval", "utility_eval", "overrefusal")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SLICE = re.compile(r"(?P<source>.+)\[(?P<start>\d*):(?P<stop>\d*)\]")


class RowStream(Generic[Item]):
    """Rows of a source, checked as they are read; can be iterated again where the source can.

    Args:
        source: each row and where it is, as messages say it.
        name: of the source.
        check: of a row.
        invalid: what to do with a row that is not valid, see `load_rows`.
        counts: what is left out is counted here, anew at each iteration.
    """

    def __init__(
        self,
        source: Callable[[], Iterable[tuple[str, Any]]],
        name: str,
        check: Check[Item],
        invalid: Invalid,
        counts: Counts,
    ) -> None:
        self._source, self._name, self._check = source, name, check
        self._invalid, self._counts = invalid, counts

    def __iter__(self) -> Iterator[Item]:
        first = ""
        self._counts.invalid = 0
        for where, row in self._source():
            try:
                yield self._check(row, where)
            except DataError as error:
                if self._invalid == "error":
                    raise
                first = first or f"the first: {error}"  # of thousands, one says enough
                self._counts.invalid += 1
        self._counts.warn_of_invalid(self._name, first)


def load_rows(
    source: Source,
    split: str | None = None,
    limit: int | None = None,
    *,
    prompt_column: str | None = None,
    response_column: str | None = None,
    invalid: Invalid = "error",
    counts: Counts | None = None,
) -> list[Row] | RowStream[Row]:
    """Read rows and check each of them.

    A row has `prompt` and `completion`, or `messages` (dicts with `role` and `content`), whose last
    assistant turn is the response; later turns are dropped. Other column names are taken in this
    order, in whatever case: `instruction`, `question`, `goal` (AdvBench, JailbreakBench),
    `forbidden_prompt` (StrongREJECT), `behavior` (HarmBench), `input` for the prompt, with a
    non-empty `input` or `context` appended after a blank line to an `instruction` or `question`,
    and HarmBench's `ContextString` before its `Behavior`; `response`, `output`, `answer` for the
    completion.

    Args:
        source: one of
            the path of a file: JSON lines (blank lines are skipped), a JSON list (`.json`), or CSV
            or TSV with a header, all UTF-8;
            `"builtin:safety"`, `"builtin:utility"`, `"builtin:safety_eval"`,
            `"builtin:utility_eval"` or `"builtin:overrefusal"`;
            a list of dicts or a `datasets.Dataset`;
            a `datasets.IterableDataset` or any other iterable that can be iterated again;
            a `datasets.DatasetDict`, or any mapping of split name to one of the former two;
            a hub id, `"owner/name"`, the only case that uses the network;
            any of these strings with a range of rows, `"rows.jsonl[100:200]"`: the first is row 0,
            the last is left out, and either bound may be.
        split: the split of a mapping or a hub id; may be left out where there is only one.
        limit: the number of rows to read, from the first; None reads all. A hub data set is then
            streamed, so that no more than these is fetched.
        prompt_column, response_column: the columns of prompt and response, in place of the usual
            ones. They do not count for the built-in sets.
        invalid: `"skip"` leaves rows out that are not valid, counts them and warns; `"error"`
            raises.
        counts: what is left out is counted here.

    Returns:
        A list where the length of the source is known, else a lazy `RowStream`.

    Raises:
        DataError: naming file and line (`rows.jsonl:7`) or index (`rows[6]`): invalid JSON or CSV,
            a missing field, a prompt or response that is empty or no string, or no row at all.
        FileNotFoundError: `source` is neither a file nor of the form of a hub id.
        ValueError, TypeError: an argument is not one of the above.

    Warns:
        UserWarning: a file or named set repeats prompts.
    """
    builtin = isinstance(source, str) and source.startswith("builtin:")
    columns = Columns() if builtin else Columns(prompt_column, response_column)
    counts = Counts() if counts is None else counts
    rows = read(source, partial(check_row, columns=columns), split, limit, invalid, counts)
    if isinstance(rows, list) and isinstance(source, (str, os.PathLike)):
        counts.warn_of_repeated(str(source), (row["prompt"] for row in rows))
    return rows


def read(
    source: Source | RowStream[Item],
    check: Check[Item],
    split: str | None,
    limit: int | None,
    invalid: Invalid,
    counts: Counts,
) -> list[Item] | RowStream[Item]:
    """What `load_rows` does, for any ``check`` of a row; errors as of it."""
    if limit is not None:
        check_count("limit", limit)
    if invalid not in ("error", "skip"):
        raise ValueError(f"invalid must be 'error' or 'skip', was {invalid!r}")

    # Rows are numbered before a range or a limit is taken: messages name the line in the file.
    def of(objects: Callable[[], Iterable[tuple[str, Any]]], name: str) -> RowStream[Item]:
        return RowStream(lambda: islice(objects(), limit), name, check, invalid, counts)

    if isinstance(source, (str, os.PathLike)):
        name, rows = row_range(source)
        bounds = (None, None) if rows is None else (rows.start, rows.stop)
        path = _local_file(name)
        if path is None:  # a hub id
            loaded = _load_hub(str(name), split, limit if rows is None else rows.stop)
            return _finite(of(lambda: islice(_named(loaded, str(name)), *bounds), str(source)))
        _refuse_split(split, f"the file {path}")
        return _finite(of(lambda: islice(read_objects(path), *bounds), str(source)))
    if isinstance(source, Mapping):
        return read(_choose_split(source, split), check, None, limit, invalid, counts)
    _refuse_split(split, f"a {type(source).__name__}")
    _check_iterable(source)
    stream = of(lambda: _named(source, "rows"), "rows")
    return _finite(stream) if isinstance(source, Sized) else stream


def row_range(source: str | os.PathLike[str]) -> tuple[str | os.PathLike[str], slice | None]:
    """Splits `"rows.jsonl[100:200]"` into the source and its range of rows, None where it has none.

    A file whose own name ends like this is taken as it is.

    Raises:
        ValueError: the range is empty.
    """
    found = _SLICE.fullmatch(source) if isinstance(source, str) else None
    if found is None or Path(source).exists():
        return source, None
    start, stop = (int(found[bound]) if found[bound] else None for bound in ("start", "stop"))
    if max(start or 0, stop or 0) > sys.maxsize:  # islice would raise, and name no argument
        raise ValueError(f"source is {source!r}, whose range has a number that is too large")
    if stop is not None and stop <= (start or 0):
        raise ValueError(f"source is {source!r}, whose range must end after its start")
    return found["source"], slice(start, stop)


def _named(source: Iterable[Any], name: str) -> Iterator[tuple[str, Any]]:
    for index, row in enumerate(source):
        yield f"{name}[{index}]", row


def _finite(rows: RowStream[Item]) -> list[Item]:
    result = list(rows)
    if not result:
        left = f": {rows._counts.invalid} are not valid" if rows._counts.invalid else ""
        raise DataError(f"{rows._name}: has no rows{left}")
    return result


def _check_iterable(source: Any) -> None:
    if not isinstance(source, Iterable):
        raise TypeError(
            "source must be a path, 'builtin:...', a hub id, a data set or a list of rows, "
            f"was {kind_of(source)}"
        )
    if isinstance(source, Iterator):
        raise TypeError(
            f"source must be iterable more than once, was a {type(source).__name__}: pass "
            "list(...) of it, or datasets.IterableDataset.from_generator(...)"
        )


def _local_file(source: str | os.PathLike[str]) -> Path | None:
    """The file that `source` names, or None where it has the form of a hub id."""
    if isinstance(source, str) and source.startswith("builtin:"):
        name = source.removeprefix("builtin:")
        if name not in BUILTIN:
            names = ", ".join(f"builtin:{name}" for name in BUILTIN)
            raise ValueError(f"source must be one of {names}, was {source!r}")
        return Path(__file__).parent / "builtin" / f"{name}.jsonl"
    path = Path(source)
    if path.is_file():
        return path
    if path.exists():
        raise ValueError(f"source must be a file, was the folder {str(path)!r}")
    if isinstance(source, str) and _HUB_ID.fullmatch(source) and path.suffix not in SUFFIXES:
        return None
    raise FileNotFoundError(
        "source must be an existing file (JSONL, JSON, CSV, parquet), 'builtin:...' or a hub id "
        f"'owner/name', was {str(source)!r}"
    )


def _load_hub(name: str, split: str | None, most: int | None) -> Iterable[Mapping[str, Any]]:
    # Imported here, because it takes a second and only this case needs it.
    from datasets import load_dataset

    loaded = load_dataset(name, split=split, streaming=most is not None)
    if isinstance(loaded, Mapping):
        loaded = _choose_split(loaded, split)
    return cast("Iterable[Mapping[str, Any]]", loaded)


def _choose_split(splits: Mapping[str, Any], split: str | None) -> Iterable[Mapping[str, Any]]:
    if any(isinstance(value, str) for value in splits.values()):  # columns, where splits would be
        raise TypeError("source must be rows, was a single row: pass a list of rows")
    if split is None and len(splits) == 1:
        split = next(iter(splits))
    if split is None or split not in splits:
        names = ", ".join(map(repr, splits))
        raise ValueError(f"split must be one of {names}, was {split!r}")
    return cast("Iterable[Mapping[str, Any]]", splits[split])


def _refuse_split(split: str | None, what: str) -> None:
    if split is not None:
        raise ValueError(f"split must be None for {what}, which has no splits, was {split!r}")
