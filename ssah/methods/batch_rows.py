"""Rows of batches: in parts that share none, and the tokens before and at their responses.

A choice is made on one part of the rows and measured on another. Ten rows with the shares (0.5,
0.25, 0.25) are parts of 5, 3 and 2 rows. They are drawn at random: loaders sort rows by length, and
the first half of them would be the longer ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ssah.data import IGNORE_INDEX
from ssah.methods.inputs import Loader


def part_of_each(n: int, shares: Sequence[float], seed: int) -> Tensor:
    """The number of the part of each of n rows: int64 ``[n]``.

    A part ends at floor(n s + 0.5) rows for the sum s of the shares so far; the last one has the
    rest.
    """
    ends = torch.tensor([int(n * end + 0.5) for end in accumulate(shares[:-1])])  # [parts - 1]
    place = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return torch.bucketize(place, ends, right=True)


def split_batches(
    loader: Loader, shares: Sequence[float], what: str, *, seed: int = 0
) -> list[list[Mapping[str, Any]]]:
    """The rows of a loader in parts, as batches that are kept in memory.

    Args:
        loader: batches of tensors ``[rows, ...]``; what is no tensor is left out.
        shares: of all rows, one a part.
        what: the loader is, for messages.
        seed: of the draw.

    Raises:
        ValueError: a part would have no row.
    """
    batches = [
        {key: value for key, value in batch.items() if isinstance(value, Tensor)}
        for batch in loader
    ]
    sizes = [len(batch["input_ids"]) for batch in batches]
    part = part_of_each(sum(sizes), shares, seed)
    _check(part, shares, what)
    parts: list[list[Mapping[str, Any]]] = [[] for _ in shares]
    for batch, own in zip(batches, part.split(sizes), strict=True):
        for number, found in enumerate(parts):
            mask = own == number  # [rows]
            if bool(mask.any()):
                found.append({key: value[mask] for key, value in batch.items()})
    return parts


def split_texts(
    texts: Sequence[str], shares: Sequence[float], what: str, *, seed: int = 0
) -> list[list[str]]:
    """Texts in parts, as `split_batches` does it."""
    part = part_of_each(len(texts), shares, seed)
    _check(part, shares, what)
    return [
        [text for text, own in zip(texts, part.tolist(), strict=True) if own == number]
        for number in range(len(shares))
    ]


def _check(part: Tensor, shares: Sequence[float], what: str) -> None:
    counts = torch.bincount(part, minlength=len(shares))
    if not bool(counts.all()):
        raise ValueError(
            f"{what} has {len(part)} rows, of which the parts {list(shares)} are "
            f"{counts.tolist()}; it must have more, so that no part is empty"
        )


def prompt_tokens(loader: Loader) -> list[list[int]]:
    """The tokens before the response of each row, without padding."""
    return [ids[: _start(labels)] for ids, labels in _rows(loader)]


def first_tokens(loader: Loader) -> list[int]:
    """The first token of the response of each row."""
    return [ids[_start(labels)] for ids, labels in _rows(loader)]


def _rows(loader: Loader) -> Iterator[tuple[list[int], list[int]]]:
    """Tokens and labels of each row."""
    for batch in loader:
        ids = batch["input_ids"]
        attended = batch.get("attention_mask", torch.ones_like(ids)).bool()
        for row in range(len(ids)):
            own = attended[row]
            yield ids[row][own].tolist(), batch["labels"][row][own].tolist()


def _start(labels: Sequence[int]) -> int:
    """Where the response begins."""
    return next(at for at, label in enumerate(labels) if label != IGNORE_INDEX)
