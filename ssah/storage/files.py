"""Files that a run leaves: written whole or not at all, and checked when they are read back.

A sealed record is a JSON object that has the SHA-256 of everything else in it, so that an edit or
a bit that flipped is noticed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

RECORD = "experiment.json"  # of a study, in its folder; the report reads it

# Name of a field -> the types that it may have.
Fields: TypeAlias = "Mapping[str, type | tuple[type, ...]]"

TEXT = (str, type(None))  # what an earlier release, or another way of making a result, lacks

_SEAL = "sha256"  # key of the checksum of everything else in a sealed record

_WORDS = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError of the block names ``path`` if it names nothing, as that of a full disk."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_whole(path: Path, content: bytes) -> None:
    """Write a file in one step: whatever happens, it is the old one or the new one, never half.

    It is on the disk when this returns, so that a power cut cannot take both.

    Raises:
        OSError: it cannot be written, e.g. since the disk is full; the file is named.
    """
    # In the same folder, so that to rename it is one step; of this process, so that two do not mix.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path):
            temporary.write_bytes(content)
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)  # the new name is in the folder, which is written by itself
    finally:
        temporary.unlink(missing_ok=True)


def check_replaceable(path: Path, mark: bytes, kind: str) -> None:
    """Refuse to write a file in the place of one of another kind, such as the model itself.

    Args:
        path: where it would be written.
        mark: what every file of the kind has among its first 4,096 bytes.
        kind: what such a file is called.

    Raises:
        IsADirectoryError: it is a folder.
        FileExistsError: there is a file that has no such mark.
    """
    if path.is_dir():
        raise IsADirectoryError(f"path is {str(path)!r}, a folder; it must be a file")
    if not path.is_file():
        return
    with path.open("rb") as file:
        if mark not in file.read(4096):
            raise FileExistsError(
                f"file {str(path)!r} is there already and is no {kind}: choose another name, or "
                "remove it"
            )


def sync(path: Path) -> None:
    """Returns once a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_hash(path: Path) -> str:
    """SHA-256 (hex) of the content of a file."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            state.update(chunk)
    return state.hexdigest()


def sealed(record: Mapping[str, Any], key: str = _SEAL) -> bytes:
    """``record`` (JSON types) as text, with its checksum in the field ``key``."""
    return (json.dumps({**record, key: _checksum(record)}, indent=2) + "\n").encode()


def read_sealed(path: Path, fields: Fields, key: str = _SEAL) -> dict[str, Any]:
    """What :func:`sealed` was given, read from a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, was edited, or has no checksum; it is named.
    """
    record = read_record(path, {key: str})
    if record.pop(key) != _checksum(record):
        raise ValueError(f"file {str(path)!r} is damaged: it is not as it was written")
    check_fields(path, record, fields)
    return record


def _checksum(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()


def read_record(path: Path, fields: Fields) -> dict[str, Any]:
    """The JSON object in a file, once its fields are known to be there and of their types.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged; the file and the field are named.
    """
    try:
        record = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # RecursionError: nested too deeply
        raise ValueError(f"file {str(path)!r} is damaged: {error}") from error
    check_fields(path, record, fields)
    return dict(record)


def check_fields(path: Path, record: Any, fields: Fields) -> None:
    """Refuse a record that lacks a field, or has one of another type.

    A number is an ``int`` or a finite ``float``; a truth value is neither.

    Args:
        path: the file that it was read from, for the message.
        record: what was read.
        fields: name -> the types that it may have.

    Raises:
        ValueError: the file and the field are named.
    """
    if not isinstance(record, dict):
        raise ValueError(f"file {str(path)!r} is damaged: it holds {_kind(record)}, not an object")
    for name, types in fields.items():
        allowed = types if isinstance(types, tuple) else (types,)
        if name not in record:
            raise ValueError(f"file {str(path)!r} is damaged: the field {name!r} is missing")
        if not any(_is(record[name], each) for each in allowed):
            words = " or ".join(_WORDS[each] for each in allowed)
            raise ValueError(
                f"file {str(path)!r} is damaged: the field {name!r} is {_kind(record[name])}, "
                f"must be {words}"
            )


def _is(value: Any, kind: type) -> bool:
    if isinstance(value, bool):  # which is an int to Python
        return kind is bool
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, kind)


def _kind(value: Any) -> str:
    return f"{value!r}" if isinstance(value, bool | float | int) else _WORDS[type(value)]
