"""The tensors of a result on disk, read one at a time.

Scores of single weights are as many numbers as the model has: of 7 B weights 28 GB. They are kept
as :func:`ssah.storage.results.save_tensors` keeps everything, in files of half a GiB, of which a
reader needs one tensor after the other.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from ssah.storage.files import check_fields, file_hash
from ssah.storage.results import META, listed, read_meta


class LazyTensors(Mapping[str, Tensor]):
    """Name -> tensor ``[...]`` on the CPU, read when it is asked for, and not kept.

    Args:
        directory: the folder.
        order: the field of its metadata that lists the names, in their order.

    Attributes:
        meta: what was written beside them.

    Raises:
        FileNotFoundError: nothing was saved there, or a file of tensors is missing.
        ValueError: a file was cut off or edited, or the list has other names; it is named.
    """

    def __init__(self, directory: str | os.PathLike[str], order: str) -> None:
        """Read the metadata and the names, and see that every file is as it was written."""
        folder = Path(directory)
        self.meta: dict[str, Any] = read_meta(folder)
        places: dict[str, Path] = {}
        for name, digest in zip(
            listed(self.meta.pop("tensors")), listed(self.meta.pop("sha256")), strict=True
        ):
            file = folder / name
            if file_hash(file) != digest:
                raise ValueError(
                    f"file {str(file)!r} is damaged: its tensors are not those of {META}"
                )
            with safe_open(file, framework="pt") as opened:
                places |= dict.fromkeys(opened.keys(), file)
        check_fields(folder / META, self.meta, {order: list})
        names = self.meta[order]
        if sorted(map(str, names)) != sorted(places):
            raise ValueError(f"file {str(folder / META)!r} is damaged: {order!r} has other names")
        self._files = {name: places[name] for name in names}  # files are sorted by names

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._files[name], framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
            return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)
