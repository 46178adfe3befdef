"""A result: a folder with ``meta.json`` and the safetensors files that it names.

Scores, for example, are ``meta.json`` and ``tensors-<hash>.safetensors``. What a plan trained of a
large model is several such files of half a GiB, written one after the other, so that no more than
one of them is in memory beside the model. The JSON is replaced last
and in one step, so that a folder holds either the whole old result or the whole new one, whatever
happens in between. :func:`load_tensors` sees that a folder is as it was written. What was written
may still be another release's, or another program's, with a field too few or scores that are NaN:
:class:`Stored` checks every field and tensor before anything is made of it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ssah.storage.files import Fields, check_fields, read_sealed, sealed, write_whole
from ssah.storage.folder_lock import one_writer

META = "meta.json"
_OWN = "meta_sha256"  # key of the checksum of everything else in that file

SHARD_BYTES = 1 << 29  # of tensors in a file, unless one tensor has more

FORMAT = 2  # of meta.json; 1 had config_hash, a hash of every setting, in place of units_hash


def save_tensors(
    directory: str | os.PathLike[str],
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    meta: Mapping[str, Any],
) -> None:
    """Write ``tensors``, of any shape, and ``meta`` (JSON types) to a folder: whole or not at all.

    An earlier result of the same kind in the folder is replaced, and what a killed process left of
    one is removed. The kind is ``meta["content"]``. Of several processes that save to one folder,
    the last one's result stays.

    Args:
        directory: the folder.
        tensors: by name, or pairs of name and tensor ``[...]`` that are made as they are asked for:
            those of one file are in memory at a time.
        meta: what is written beside them.

    Raises:
        ValueError: ``meta`` has a reserved key, ``"tensors"``, ``"sha256"`` or ``"meta_sha256"``;
            the folder holds a result of another kind.
        OSError: the disk is full, or the like; an earlier result is still there.
    """
    reserved = {"tensors", "sha256", _OWN} & set(meta)
    if reserved:
        raise ValueError(f"meta has the reserved keys {sorted(reserved)}")
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
    with one_writer(folder):
        check_kind(folder, meta.get("content"))
        # Nobody else writes here now, so that these are a killed process's.
        for half in (*folder.glob(".tensors-*.tmp"), *folder.glob(f".{META}.*.tmp")):
            half.unlink()
        before = set(folder.glob("tensors-*.safetensors"))
        try:
            digests = [_write_shard(folder, shard) for shard in _shards(pairs)]
        except BaseException:  # the disk is full, for one: what was written would fill it further
            for half in set(folder.glob("tensors-*.safetensors")) - before:
                half.unlink()
            raise
        names = [_named(digest) for digest in digests]
        # One file is told as it always was, so that earlier releases read it.
        several = len(names) > 1
        record = {
            **meta,
            "tensors": names if several else names[0],
            "sha256": digests if several else digests[0],
        }
        write_whole(folder / META, sealed(record, _OWN))
        for old in folder.glob("tensors-*.safetensors"):
            if old.name not in names:
                old.unlink()


def _named(digest: str) -> str:
    """A file of tensors is named by its content: an old meta.json goes on naming the old ones."""
    return f"tensors-{digest[:12]}.safetensors"


def _shards(pairs: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Tensors by name in pieces of about ``SHARD_BYTES``; at least one piece, if an empty one."""
    shard: dict[str, Tensor] = {}
    n_bytes, n_shards = 0, 0
    for name, tensor in pairs:
        shard[name] = tensor.contiguous()
        n_bytes += tensor.nbytes
        del tensor  # it would be kept while the next one is made, beside a shard that is written
        if n_bytes >= SHARD_BYTES:
            yield shard
            shard, n_bytes, n_shards = {}, 0, n_shards + 1
    if shard or not n_shards:
        yield shard


def _write_shard(folder: Path, shard: dict[str, Tensor]) -> str:
    """Write one file; returns its SHA-256 (hex)."""
    content = safetensors.torch.save(shard)
    digest = hashlib.sha256(content).hexdigest()
    write_whole(folder / _named(digest), content)
    return digest


def check_kind(folder: Path, content: object) -> None:
    """Refuse to replace scores by groups, groups by an update, and so on.

    Raises:
        ValueError: the folder holds a result of another kind; what cannot be read back may go.
    """
    there = kind_in(folder)
    if there is not None and there != content:
        raise ValueError(
            f"directory {str(folder)!r} holds {there!r}, which {content!r} must not replace: "
            "choose another directory, or remove that one"
        )


def kind_in(folder: Path) -> object:
    """The kind of result in a folder; None: nothing is there, or nothing that anybody could use."""
    try:
        return json.loads((folder / META).read_bytes())["content"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def load_tensors(directory: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save_tensors` wrote: tensors ``[...]`` on the CPU, and the metadata.

    Raises:
        FileNotFoundError: the folder has no ``meta.json``, or not the tensors that it names.
        ValueError: a file was cut off or edited; it is named.
    """
    folder = Path(directory)
    while True:  # until all files are of one result
        meta = read_meta(folder)
        try:
            tensors = _read_shards(folder, meta)
            break
        except FileNotFoundError:
            if read_meta(folder) == meta:
                raise  # and not replaced by another process between two files
    del meta["tensors"], meta["sha256"]
    return tensors, meta


def _read_shards(folder: Path, meta: Mapping[str, Any]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, expected in zip(listed(meta["tensors"]), listed(meta["sha256"]), strict=True):
        file = folder / name
        content = file.read_bytes()
        if hashlib.sha256(content).hexdigest() != expected:
            raise ValueError(f"file {str(file)!r} is damaged: its tensors are not those of {META}")
        try:
            tensors |= safetensors.torch.load(content)
        except safetensors.SafetensorError as error:
            raise ValueError(f"file {str(file)!r} is damaged: {error}") from error
    return tensors


def listed(value: Any) -> list[Any]:
    """A field that is one thing or a list of several."""
    return value if isinstance(value, list) else [value]


def read_meta(folder: Path) -> dict[str, Any]:
    """The metadata alone, with the names and the hashes of the files of tensors.

    Raises:
        FileNotFoundError: nothing was saved there.
        ValueError: the file is damaged; it is named.
    """
    path = folder / META
    if not path.is_file():
        raise FileNotFoundError(f"directory {str(folder)!r} has no {META}: nothing was saved there")
    meta = read_sealed(path, {"tensors": (str, list), "sha256": (str, list)}, _OWN)
    names = listed(meta["tensors"])
    if len(names) != len(listed(meta["sha256"])):
        raise ValueError(f"file {str(path)!r} is damaged: 'tensors' and 'sha256' differ in length")
    # A file from elsewhere may name any path.
    if any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise ValueError(f"file {str(path)!r} is damaged: it names tensors outside its folder")
    return meta


class Stored:
    """The content of a folder that a result was saved to.

    Args:
        directory: the folder.
        content: the kind of result that it must hold.
        fields: of ``meta.json``: name -> types.
        optional: fields that an earlier release did not write -> what they are then.

    Attributes:
        meta: the fields.

    Raises:
        FileNotFoundError: nothing was saved there.
        ValueError: it holds something else, was damaged, or lacks a field; the file is named.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        content: str,
        fields: Fields,
        optional: Mapping[str, Any] | None = None,
    ) -> None:
        self.tensors, meta = load_tensors(directory)
        self.path = Path(directory) / META
        if meta.get("content") != content:
            raise ValueError(
                f"directory {str(directory)!r} holds {meta.get('content')!r}; it must hold "
                f"{content!r}"
            )
        self.meta = {**(optional or {}), **meta}  # what the file says counts
        check_fields(self.path, self.meta, fields)

    def damaged(self, how: str) -> ValueError:
        """The error of what cannot be used."""
        return ValueError(f"file {str(self.path)!r} is damaged: {how}")

    def choice(self, field: str, allowed: Iterable[str]) -> None:
        """Refuse a field that is not among the allowed values."""
        values = tuple(allowed)
        if self.meta[field] not in values:
            raise self.damaged(
                f"the field {field!r} is {self.meta[field]!r}, must be one of {', '.join(values)}"
            )

    def names(self, field: str) -> list[str]:
        """A list of different strings, at least one, or the keys of an object."""
        found = list(self.meta[field])
        if not found or not all(isinstance(each, str) for each in found):
            raise self.damaged(f"the field {field!r} is {found!r:.80}, must have names of modules")
        if len(set(found)) < len(found):
            raise self.damaged(f"the field {field!r} has a name twice")
        return found

    def tensor(
        self,
        key: str,
        *,
        dtype: torch.dtype = torch.float64,
        shape: tuple[int | None, ...] = (None,),
        finite: bool = True,
    ) -> Tensor:
        """One tensor, of this dtype and shape (None: any size above 0; ``(None,)``: ``[n]``).

        Args:
            key: its name in the file.
            dtype, shape: what it must be.
            finite: whether NaN and infinity are refused.
        """
        tensor = self.tensors.get(key)
        if tensor is None:
            raise self._wrong(key, "is missing")
        fits = tensor.dim() == len(shape) and all(
            n > 0 if expected is None else n == expected
            for n, expected in zip(tensor.shape, shape, strict=True)
        )
        if tensor.dtype != dtype or not fits:
            wanted = ", ".join("n" if n is None else str(n) for n in shape)
            raise self._wrong(
                key, f"is {tensor.dtype} {list(tensor.shape)}, must be {dtype} [{wanted}]"
            )
        if finite and not bool(tensor.isfinite().all()):
            raise self._wrong(key, "has NaN or infinite values")
        return tensor

    def _wrong(self, key: str, how: str) -> ValueError:
        return ValueError(
            f"directory {str(self.path.parent)!r} is damaged: the tensor {key!r} {how}"
        )
