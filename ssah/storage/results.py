"""Which model and data a result came from, and how results are written and read.

A result is a folder with ``meta.json`` and one safetensors file that it names. The JSON is
replaced last and in one step, so that a folder holds either the whole old result or the whole new
one, whatever happens in between.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from ssah.storage.files import read_sealed, sealed, write_whole
from ssah.storage.folder_lock import one_writer

META = "meta.json"
_OWN = "meta_sha256"  # key of the checksum of everything else in that file

FORMAT = 2  # of meta.json; 1 had config_hash, a hash of every setting, in place of units_hash


def save_tensors(
    directory: str | os.PathLike[str], tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> None:
    """Write ``tensors`` and ``meta`` (JSON types only) to ``directory``: whole, or not at all.

    An earlier result of the same kind in the folder is replaced, and what a killed process left of
    one is removed. The kind is ``meta["content"]``. Of several processes that save to one folder,
    the last one's result stays.

    Raises:
        ValueError: ``meta`` has a reserved key, ``"tensors"``, ``"sha256"`` or ``"meta_sha256"``;
            the folder holds a result of another kind.
        OSError: the disk is full, or the like; an earlier result is still there.
    """
    reserved = {"tensors", "sha256", _OWN} & set(meta)
    if reserved:
        raise ValueError(f"meta has the reserved keys {sorted(reserved)}")
    folder = Path(directory)
    content = safetensors.torch.save({key: value.contiguous() for key, value in tensors.items()})
    digest = hashlib.sha256(content).hexdigest()
    name = f"tensors-{digest[:12]}.safetensors"
    record = {**meta, "tensors": name, "sha256": digest}
    folder.mkdir(parents=True, exist_ok=True)
    with one_writer(folder):
        check_kind(folder, meta.get("content"))
        for half in (*folder.glob(".tensors-*.tmp"), *folder.glob(f".{META}.*.tmp")):
            half.unlink()
        write_whole(folder / name, content)
        write_whole(folder / META, sealed(record, _OWN))
        for old in folder.glob("tensors-*.safetensors"):
            if old.name != name:
                old.unlink()


def check_kind(folder: Path, content: object) -> None:
    """Refuse to replace scores by groups, groups by an update, and so on.

    Raises:
        ValueError: the folder holds a result of another kind; what cannot be read back may go.
    """
    try:
        there = json.loads((folder / META).read_bytes())["content"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return
    if there != content:
        raise ValueError(
            f"directory {str(folder)!r} holds {there!r}, which {content!r} must not replace: "
            "choose another directory, or remove that one"
        )


def load_tensors(directory: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save_tensors` wrote: the tensors (on the CPU) and the metadata.

    Raises:
        FileNotFoundError: the folder has no ``meta.json``, or not the tensors that it names.
        ValueError: a file was cut off or edited; it is named.
    """
    folder = Path(directory)
    while True:
        meta = _read_meta(folder)
        file = folder / meta["tensors"]
        try:
            content = file.read_bytes()
            break
        except FileNotFoundError:
            if _read_meta(folder) == meta:
                raise  # and not replaced by another process between the two files
    del meta["tensors"]
    digest = hashlib.sha256(content).hexdigest()
    if digest != meta.pop("sha256"):
        raise ValueError(f"file {str(file)!r} is damaged: its tensors are not those of {META}")
    try:
        return safetensors.torch.load(content), meta
    except safetensors.SafetensorError as error:
        raise ValueError(f"file {str(file)!r} is damaged: {error}") from error


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / META
    if not path.is_file():
        raise FileNotFoundError(f"directory {str(folder)!r} has no {META}: nothing was saved there")
    meta = read_sealed(path, {"tensors": str, "sha256": str}, _OWN)
    if Path(meta["tensors"]).name != meta["tensors"]:
        raise ValueError(f"file {str(path)!r} is damaged: it names tensors outside its folder")
    return meta
