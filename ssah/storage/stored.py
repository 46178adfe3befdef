"""A result that is read back: every field and tensor is checked before anything is made of it.

`ssah.storage.load_tensors` sees that a folder is as it was written. What was written may still
be another release's, or another program's: a field too few, scores that are NaN.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssah.storage.files import Fields, check_fields
from ssah.storage.results import META, load_tensors


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
        self.meta = {**(optional or {}), **meta}
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
        """One tensor, of this dtype and shape (None: any size above 0).

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
