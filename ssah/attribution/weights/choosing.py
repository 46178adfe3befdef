"""Choices of single weights by their scores: the highest share of a row, of a matrix, of a model.

A share f of n weights is floor(f * n + 0.5) of them, and of equal scores the lower index is taken.
Example: the rows (5, 1, 5) and (9, 2, 3), half of each:

    per row       floor(1.5 + 0.5) = 2 of each     (5, ., 5) and (9, ., 3)
    per matrix    floor(3 + 0.5) = 3 of the six    (5, ., 5) and (9, ., .)

Over a whole model the scores are never held at once. A float32 that is not negative is ordered as
the integer that its bits are, of 31 bits here. One pass counts how many scores there are of each
upper 15 bits, which says those of the score at the edge. A second one counts the lower 16 bits of
the scores that have these. Then the edge is known exactly, and how many that are equal to it count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from ssah.units import BitMask, share_count

_LOW = 16  # bits that the second pass counts
_LARGEST = 0x7FFF_FFFF
_AT_ONCE = 1 << 22  # scores


def choose(
    scores: Mapping[str, Tensor],
    share: float,
    per: str,
    transposed: Iterable[str],
    *,
    lowest: bool = False,
) -> dict[str, BitMask]:
    """The share of the weights with the highest scores, or with the lowest.

    Args:
        scores: parameter -> float32 ``[..., out, in]``, 0 or more; each is read up to three times.
        share: from 0 to 1.
        per: ``"row"``, ``"matrix"`` or ``"model"``.
        transposed: the parameters that are ``[..., in, out]``.
        lowest: whether the lowest are meant.

    Raises:
        ValueError: a score is negative or not finite, or they are of another dtype.
    """
    turned = set(transposed)

    def key(param: str) -> Tensor:
        """Integers, the larger the sooner chosen, of the shape of the parameter."""
        own = scores[param]
        if own.dtype != torch.float32 or not 0 <= float(own.min()) <= float(own.max()) < torch.inf:
            raise ValueError(
                f"scores of {param!r} are {own.dtype} from {own.min():g} to {own.max():g}; they "
                "must be torch.float32, finite, and none below 0"
            )
        bits = own.abs().contiguous().view(torch.int32)  # without the sign of -0
        return _LARGEST - bits if lowest else bits

    if per == "row":
        return {param: BitMask.of(_by_row(key(param), share, param in turned)) for param in scores}
    if per == "matrix":
        return {param: BitMask.of(_by_matrix(key(param), share)) for param in scores}
    total = sum(scores[param].numel() for param in scores)
    edge = Edge(lambda: map(key, scores), share_count(share, total))
    return {param: BitMask.of(edge.chosen(key(param))) for param in scores}


def _by_row(keys: Tensor, share: float, turned: bool) -> Tensor:
    """Bool, of the shape of ``keys``, ``[..., out, in]`` or turned: a share of each output's."""
    rows = keys.mT if turned else keys
    flat = rows.reshape(-1, rows.shape[-1])  # [rows, in]
    n = flat.shape[1]
    count = share_count(share, n)
    chosen = torch.zeros(flat.shape, dtype=torch.bool)
    if count:
        for start in range(0, len(flat), step := max(1, _AT_ONCE // n)):
            some = flat[start : start + step]
            edge = some.kthvalue(n - count + 1, dim=1, keepdim=True).values  # [rows, 1]
            above, equal = some > edge, some == edge
            left = count - above.sum(1, keepdim=True)  # [rows, 1], of the equal ones
            chosen[start : start + step] = above | (equal & (equal.cumsum(1) <= left))
    found = chosen.view(rows.shape)
    return found.mT if turned else found


def _by_matrix(keys: Tensor, share: float) -> Tensor:
    """Bool, of the shape of ``keys``, ``[rows, columns]`` or ``[experts, rows, columns]``."""
    count = share_count(share, keys[0].numel() if keys.dim() == 3 else keys.numel())
    parts = keys if keys.dim() == 3 else keys[None]
    found = [Edge(lambda part=part: [part], count).chosen(part) for part in parts]  # type: ignore[misc]
    return torch.stack(found).view(keys.shape)


class Edge:
    """The least key that is chosen, and how many of those that are equal to it are.

    `chosen` is asked of the tensors in the order in which they were counted.
    """

    def __init__(self, tensors: Callable[[], Iterable[Tensor]], count: int) -> None:
        """Of the ``count`` highest keys in all tensors, int32 of any shape: read twice."""
        if count == 0:
            self._key, self._ties = _LARGEST, 0  # above which there is none
            return
        upper, count = _bin_of(_counts(key >> _LOW for key in _pieces(tensors())), count)
        below = (key[key >> _LOW == upper] & 0xFFFF for key in _pieces(tensors()))
        lower, self._ties = _bin_of(_counts(below), count)
        self._key = upper << _LOW | lower

    def chosen(self, keys: Tensor) -> Tensor:
        """Bool, of the shape ``[...]`` of ``keys``: those of the next tensor that are chosen."""
        found = keys > self._key
        if self._ties:
            equal = (keys == self._key).flatten().nonzero()[: self._ties, 0]
            found.view(-1)[equal] = True
            self._ties -= len(equal)
        return found


def _pieces(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Tensors ``[...]`` as pieces ``[n]``, of which integers of 64 bits are made one at a time."""
    for tensor in tensors:
        yield from tensor.reshape(-1).split(_AT_ONCE)


def _counts(numbers: Iterable[Tensor]) -> Tensor:
    """How often each number below 2^16 is there: int64 ``[2^16]``."""
    return sum((torch.bincount(n, minlength=1 << _LOW) for n in numbers), torch.tensor(0))


def _bin_of(counts: Tensor, count: int) -> tuple[int, int]:
    """The number that the ``count``-th highest one is, and how many are left for it to give."""
    reached = counts.flip(0).cumsum(0)  # from the highest number on
    place = int(torch.searchsorted(reached, count))
    before = int(reached[place - 1]) if place else 0
    return len(counts) - 1 - place, count - before
