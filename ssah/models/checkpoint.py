"""Weights in safetensors files, read with plain reads, each when it is asked for.

A mapped file counts as resident memory once it is touched. What is read here lies in memory of its
own, which goes with the tensor; pages that the system keeps of the file are nobody's.

A safetensors file has the length of its header (8 bytes, little endian), the header (JSON), and
the tensors, whose offsets count from the end of the header. Example: a file begins with the number
80, and its header has ``"b": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [24, 36]}``. Then
b's 12 bytes are at position 8 + 80 + 24 = 112.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {  # what a safetensors file calls a type
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class _Entry:
    """Where a tensor is: ``start`` is a position in ``file``, bytes."""

    file: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """The tensor, ``[*shape]``.

        Raises:
            ValueError: the file ends before it.
        """
        content = torch.empty(self.n_bytes, dtype=torch.uint8)  # [bytes]
        with self.file.open("rb") as handle:
            handle.seek(self.start)
            # Large reads go past the handle's buffer, straight into the tensor.
            if handle.readinto(content.numpy().data) < self.n_bytes:
                raise ValueError(f"file {str(self.file)!r} ends early: it was cut off")
        return content.view(self.dtype).view(self.shape)


class Checkpoint:
    """The tensors of one or several safetensors files.

    Attributes:
        files: that hold them.
        bytes_read: of tensors, so far.
        seconds: spent reading, so far.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        """Read the headers alone.

        Raises:
            ValueError: a file is not safetensors, or ends too early, or holds a type that is
                not a plain number.
        """
        self.files = tuple(files)
        self.bytes_read = 0
        self.seconds = 0.0
        self._entries = {name: entry for file in files for name, entry in _header(file).items()}

    @classmethod
    def in_folder(cls, folder: Path) -> Checkpoint:
        """The checkpoint that ``save_pretrained`` wrote, sharded or not.

        Raises:
            FileNotFoundError: there is none, or a shard is missing.
            ValueError: a file is damaged.
        """
        if (folder / INDEX).is_file():
            files = [folder / shard for shard in _shards(folder / INDEX)]
        else:
            files = [folder / _SINGLE]
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(f"there is no {file.name} in {str(folder)!r}")
        return cls(files)

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors, in the order of the files."""
        return tuple(self._entries)

    @property
    def dtype(self) -> torch.dtype:
        """Of the first tensor that is of a floating type."""
        return next(e.dtype for e in self._entries.values() if e.dtype.is_floating_point)

    @property
    def fingerprint(self) -> str:
        """A hash of the names, sizes and times of the files: another one once they have changed."""
        # Not of the contents: to read them all would take as long as the run.
        about = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in self.files]
        return hashlib.sha256(repr(about).encode()).hexdigest()

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor."""
        return self._entries[name].shape

    def dtype_of(self, name: str) -> torch.dtype:
        """Of one tensor."""
        return self._entries[name].dtype

    def in_file(self, file: Path) -> tuple[str, ...]:
        """The tensors of one file, from its front to its back."""
        own = {name: entry for name, entry in self._entries.items() if entry.file == file}
        return tuple(sorted(own, key=lambda name: own[name].start))

    def n_bytes(self, names: Iterable[str]) -> int:
        """Size of some tensors."""
        return sum(self._entries[name].n_bytes for name in names)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Some tensors ``[...]`` as stored, read in the order of the files.

        Raises:
            ValueError: a file has become shorter than it was.
        """
        start = time.perf_counter()
        # A disk is fastest from front to back.
        chosen = [(self._entries[name], name) for name in names]
        chosen.sort(key=lambda pair: (pair[0].file, pair[0].start))
        tensors = {name: entry.read() for entry, name in chosen}
        self.bytes_read += sum(tensor.nbytes for tensor in tensors.values())
        self.seconds += time.perf_counter() - start
        return tensors


def weights_folder(source: str, local: bool, *, beside: Sequence[str] = ()) -> Path:
    """Where the weights are; those of a hub id are fetched first, and found again later.

    Args:
        source, local: as `ssah.models.locate` has them.
        beside: patterns of other files that are fetched too.
    """
    if local:
        return Path(source)
    from huggingface_hub import snapshot_download

    files = [_SINGLE, "model-*-of-*.safetensors", INDEX, *beside]
    return Path(snapshot_download(source, allow_patterns=files))


def _shards(index: Path) -> list[str]:
    """The names of the files that an index names, all of them in its own folder."""
    try:
        shards = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"file {str(index)!r} is damaged: it has no weight_map") from error
    for shard in shards:
        # An index from elsewhere must not have us read files outside of its folder.
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(
                f"file {str(index)!r} names {shard!r}, which must be a file of its own folder"
            )
    return sorted(shards)


def _header(file: Path) -> dict[str, _Entry]:
    """Where each tensor of a file is."""
    try:
        with safe_open(file, framework="pt"):  # overlaps, holes, offsets, sizes: all its rules
            pass
    except SafetensorError as error:
        raise ValueError(
            f"file {str(file)!r} is not safetensors, or was cut off or damaged ({error})"
        ) from error
    with file.open("rb") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
        header = json.loads(handle.read(length))
    header.pop("__metadata__", None)  # text of whoever wrote the file
    entries = {}
    for name, about in header.items():
        start = 8 + length + about["data_offsets"][0]
        dtype = DTYPES.get(about["dtype"])
        if dtype is None:
            raise ValueError(
                f"file {str(file)!r}: {name!r} has the type {about['dtype']}, must be one of "
                f"{', '.join(DTYPES)}"
            )
        entries[name] = _Entry(file, start, dtype, tuple(about["shape"]))
    return entries
