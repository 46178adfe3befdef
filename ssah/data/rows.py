"""Reads rows from JSONL files, `datasets` objects, lists and the built-in sets, and checks them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sized
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, TypedDict, cast

Message: TypeAlias = "dict[str, str]"  # one turn: "role" and "content"
Source: TypeAlias = "str | os.PathLike[str] | Iterable[Mapping[str, Any]] | Mapping[str, Any]"

BUILTIN = ("safety", "utility", "safety_eval", "utility_eval", "overrefusal")

_PROMPT_KEYS = ("prompt", "instruction", "question", "input")
_CONTEXT_KEYS = ("input", "context")
_COMPLETION_KEYS = ("completion", "response", "output", "answer")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SLICE = re.compile(r"(?P<source>.+)\[(?P<start>\d*):(?P<stop>\d*)\]")


class DataError(ValueError):
    """A row that cannot be used; the message names its file and line, or its index, and why."""


class _PromptCompletion(TypedDict):
    prompt: str
    completion: str


class Row(_PromptCompletion, total=False):
    """A checked row.

    `completion` is the response; `prompt` is the turn before it. A row that came as `messages`
    keeps the whole conversation there, up to and including the response. `category` is kept
    where the source has one.
    """

    messages: list[Message]
    category: str


class RowStream:
    """Rows of a source without a known length, checked as they are read; can be iterated again."""

    def __init__(self, source: Iterable[Mapping[str, Any]], name: str, limit: int | None) -> None:
        self._source, self._name, self._limit = source, name, limit

    def __iter__(self) -> Iterator[Row]:
        for index, row in enumerate(islice(self._source, self._limit)):
            yield check_row(row, f"{self._name}[{index}]")


def load_rows(
    source: Source, split: str | None = None, limit: int | None = None
) -> list[Row] | RowStream:
    """Read rows and check each of them.

    A row has `prompt` and `completion`, or `messages` (dicts with `role` and `content`), whose last
    assistant turn is the response; later turns are dropped. Other column names are taken in this
    order: `instruction`, `question`, `input` for the prompt, with a non-empty `input` or `context`
    appended after a blank line to an `instruction` or `question`; `response`, `output`, `answer`
    for the completion.

    Args:
        source: one of
            the path of a JSONL file (UTF-8, blank lines are skipped);
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

    Returns:
        A list where the length of the source is known, else a lazy `RowStream`.

    Raises:
        DataError: naming file and line (`rows.jsonl:7`) or index (`rows[6]`): invalid JSON, a
            missing field, a prompt or response that is empty or no string, or no row at all.
        FileNotFoundError: `source` is neither a file nor of the form of a hub id.
        ValueError, TypeError: an argument is not one of the above.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 or None, was {limit}")
    if isinstance(source, (str, os.PathLike)):
        name, rows = row_range(source)
        if rows is not None:
            return _finite(islice(load_rows(name, split), rows.start, rows.stop), str(source))[
                :limit
            ]
        path = _local_file(source)
        if path is None:
            return _load_hub(str(source), split, limit)
        _refuse_split(split, f"the file {path}")
        return _finite(islice(_read_jsonl(path), limit), str(path))
    if isinstance(source, Mapping):
        return load_rows(_choose_split(source, split), limit=limit)
    _refuse_split(split, f"a {type(source).__name__}")
    return _from_iterable(source, "rows", limit)


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
    if stop is not None and stop <= (start or 0):
        raise ValueError(f"source is {source!r}, whose range must end after its start")
    return found["source"], slice(start, stop)


def check_row(row: Mapping[str, Any], where: str) -> Row:
    """Return `row` with the standard fields; checked rows come back equal.

    Raises:
        DataError: beginning with `where`, as `load_rows` describes.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: a row must be an object with named fields, was {_kind(row)}")
    if row.get("messages") is not None:
        checked = _from_messages(row["messages"], where)
    else:
        checked = _from_columns(row, where)
    if not checked["prompt"].strip():
        raise DataError(f"{where}: the prompt is empty")
    if not checked["completion"].strip():
        raise DataError(f"{where}: the response is empty")
    if isinstance(row.get("category"), str):
        checked["category"] = row["category"]
    return checked


def _from_messages(messages: Any, where: str) -> Row:
    if not isinstance(messages, list):
        raise DataError(f"{where}: 'messages' must be a list of turns, was {_kind(messages)}")
    turns: list[Message] = []
    for number, turn in enumerate(messages):
        if not isinstance(turn, Mapping):
            raise DataError(f"{where}: messages[{number}] must be an object, was {_kind(turn)}")
        for key in ("role", "content"):
            if not isinstance(turn.get(key), str):
                raise DataError(
                    f"{where}: messages[{number}] must have a string {key!r}, "
                    f"was {_kind(turn.get(key))}"
                )
        turns.append({"role": turn["role"], "content": turn["content"]})
    while turns and turns[-1]["role"] != "assistant":
        turns.pop()
    if not turns:
        raise DataError(f"{where}: 'messages' has no assistant turn, so there is no response")
    if len(turns) == 1:
        raise DataError(f"{where}: 'messages' has no turn before the response")
    return {
        "prompt": turns[-2]["content"],
        "completion": turns[-1]["content"],
        "messages": turns,
    }


def _from_columns(row: Mapping[str, Any], where: str) -> Row:
    prompt_key, prompt = _first_field(row, _PROMPT_KEYS, "prompt", where)
    _, completion = _first_field(row, _COMPLETION_KEYS, "response", where)
    if prompt_key in ("instruction", "question") and prompt.strip():
        for key in _CONTEXT_KEYS:
            context = row.get(key)
            if isinstance(context, str) and context.strip():
                prompt = f"{prompt}\n\n{context}"
                break
    return {"prompt": prompt, "completion": completion}


def _first_field(
    row: Mapping[str, Any], keys: tuple[str, ...], what: str, where: str
) -> tuple[str, str]:
    key = next((key for key in keys if row.get(key) is not None), None)
    if key is None:
        raise DataError(
            f"{where}: no {what}: needs one of {', '.join(map(repr, keys))}, or 'messages'; "
            f"has {', '.join(repr(key) for key in row) or 'no field'}"
        )
    if not isinstance(row[key], str):
        raise DataError(f"{where}: {key!r} must be a string, was {_kind(row[key])}")
    return key, row[key]


def _kind(value: Any) -> str:
    return "missing" if value is None else f"of type {type(value).__name__}"


def read_objects(path: Path) -> Iterator[tuple[str, Any]]:
    """Each line of a JSONL file: where it is, as messages say it, and its JSON."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                yield where, json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:  # of the JSON, or of its UTF-8
                raise DataError(f"{where}: invalid JSON: {error}") from error


def _read_jsonl(path: Path) -> Iterator[Row]:
    for where, row in read_objects(path):
        yield check_row(row, where)


def _finite(rows: Iterable[Row], name: str) -> list[Row]:
    result = list(rows)
    if not result:
        raise DataError(f"{name}: has no rows")
    return result


def _from_iterable(source: Any, name: str, limit: int | None) -> list[Row] | RowStream:
    if not isinstance(source, Iterable):
        raise TypeError(
            "source must be a path, 'builtin:...', a hub id, a data set or a list of rows, "
            f"was {_kind(source)}"
        )
    if isinstance(source, Iterator):
        raise TypeError(
            f"source must be iterable more than once, was a {type(source).__name__}: pass "
            "list(...) of it, or datasets.IterableDataset.from_generator(...)"
        )
    stream = RowStream(source, name, limit)
    return _finite(stream, name) if isinstance(source, Sized) else stream


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
        raise ValueError(f"source must be a JSONL file, was the folder {str(path)!r}")
    if isinstance(source, str) and _HUB_ID.fullmatch(source) and path.suffix != ".jsonl":
        return None
    raise FileNotFoundError(
        f"source must be an existing JSONL file, 'builtin:...' or a hub id 'owner/name', "
        f"was {str(source)!r}"
    )


def _load_hub(name: str, split: str | None, limit: int | None) -> list[Row] | RowStream:
    # Imported here, because it takes a second and only this case needs it.
    from datasets import load_dataset

    loaded = load_dataset(name, split=split, streaming=limit is not None)
    if isinstance(loaded, Mapping):
        loaded = _choose_split(loaded, split)
    if limit is None:
        return _from_iterable(loaded, name, limit)
    return _finite(RowStream(loaded, name, limit), name)


def _choose_split(splits: Mapping[str, Any], split: str | None) -> Iterable[Mapping[str, Any]]:
    if any(isinstance(value, str) for value in splits.values()):
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
