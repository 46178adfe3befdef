"""Files of rows: JSON lines, a JSON list, CSV or TSV with a header, and parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ssah.data.fields import DataError, kind_of

_SEPARATORS = {".csv": ",", ".tsv": "\t"}
# No data set of the Hub is called like this.
SUFFIXES = (".jsonl", ".json", ".txt", ".parquet", *_SEPARATORS)


def read_objects(path: Path) -> Iterator[tuple[str, Any]]:
    """Each row of a file: where it is, as messages say it, and its fields.

    A row that cannot be read comes as the DataError that says why, so that it can be left out.

    Args:
        path: ``.csv`` or ``.tsv`` with a header; ``.parquet``; ``.json`` with one list of objects;
            anything else, and ``.json`` of another form, is JSON lines. All texts are UTF-8.

    Raises:
        DataError: a file of which no further row can be read.
    """
    if path.suffix.lower() in _SEPARATORS:
        return _read_csv(path, _SEPARATORS[path.suffix.lower()])
    if path.suffix.lower() == ".parquet":
        return _read_parquet(path)
    if path.suffix.lower() == ".json":
        with path.open("rb") as file:
            # `.json` with JSON lines in it is common: datasets of the Hub are written like this.
            start = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
        if start.startswith(b"["):
            return _read_list(path)
    return _read_lines(path)


def _read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                yield where, json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:  # of the JSON, of its UTF-8, or too deep
                yield where, DataError(f"{where}: invalid JSON: {error}")


def _read_list(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: invalid JSON: {error}") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: must be a list of rows, was {kind_of(rows)}")
    for index, row in enumerate(rows):
        yield f"{path}[{index}]", row


def _read_csv(path: Path, separator: str) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        # strict: a quote that is not closed would make one row of all that follow.
        rows = csv.reader(file, delimiter=separator, strict=True)
        try:
            header = next(rows, [])
            if len(header) == 1 and ";" in header[0]:  # as spreadsheets save it in some countries
                raise DataError(
                    f"{path}:1: the header is {header[0]!r}, in one cell: a {path.suffix} is "
                    f"separated by {separator!r}, and not by ';'"
                )
            for name in header:
                if header.count(name) > 1:
                    raise DataError(f"{path}:1: the header names the column {name!r} twice")
            for row in rows:
                where = f"{path}:{rows.line_num}"
                if not row:  # a blank line
                    continue
                if len(row) != len(header):
                    yield (
                        where,
                        DataError(
                            f"{where}: has {len(row)} cells, must have {len(header)}, as the "
                            "header: a text with the separator in it must stand in quotes"
                        ),
                    )
                    continue
                yield where, dict(zip(header, row, strict=True))
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}:{rows.line_num + 1}: invalid CSV: {error}") from error


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile  # comes with datasets, and takes a while

    try:
        with ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            for index, row in enumerate(rows):
                yield f"{path}[{index}]", row
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: invalid parquet: {error}") from error
