"""Which elements of a delta are kept: the largest, or some drawn at random.

**The largest.** A share f of n elements is the floor(f n + 0.5) with the greatest |d|, which is
rounded to float32 for it. Positive floats are ordered as the integers that their bits spell, so
that the smallest one kept is found by counting: once by the upper 16 bits of all magnitudes, and
once by the lower 16 bits of those whose upper bits are the ones looked for. No more than one tensor
is in memory. Example: of |d| = 3, 1, 1, 2, 1 a share of 0.6 is 3 elements. The smallest kept is 1,
of which one is kept beside 3 and 2: that of the lowest index. Over several tensors the first by
name has the lowest.

**At random.** Every element is kept with probability f (Bernoulli), drawn by a generator whose seed
is a hash of the user's seed, the name of the tensor and the place of the tuned model among several.
So neither the files nor the order in which tensors are read change what is drawn.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_HALF = 16  # bits
_BINS = 1 << _HALF


class Draw:
    """Elements of one tensor kept at random; pieces are asked for from its front to its back."""

    def __init__(self, share: float, seed: int, name: str, place: int) -> None:
        digest = hashlib.sha256(f"{seed}/{place}/{name}".encode()).digest()
        self._generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        self._share = share

    def mask(self, delta: Tensor) -> Tensor:
        """Bool ``[n]``: what is kept of the next piece ``[n]``."""
        drawn = torch.rand(len(delta), generator=self._generator, dtype=torch.float64)
        return drawn < self._share


@dataclass
class Largest:
    """The largest elements of one tensor; pieces are asked for from its front to its back.

    Attributes:
        smallest: bits of the least magnitude that is kept.
        ties: how many elements of just that magnitude are kept still.
    """

    smallest: int
    ties: int

    def mask(self, delta: Tensor) -> Tensor:
        """Bool ``[n]``: what is kept of the next piece ``[n]``."""
        bits = _bits(delta)
        mask = bits > self.smallest
        if self.ties:
            equal = (bits == self.smallest).nonzero()[: self.ties, 0]
            mask[equal] = True
            self.ties -= len(equal)
        return mask


def largest(
    names: Iterable[str], deltas: Callable[[str], Iterable[Tensor]], share: float
) -> Mapping[str, Largest]:
    """The largest elements of several tensors taken together.

    Args:
        names: of the tensors.
        deltas: gives a tensor's delta in pieces ``[n]``; called twice for each.
        share: of all elements.
    """
    ordered = sorted(names)  # ties go to the first, whatever file it is in
    upper = torch.zeros(_BINS, dtype=torch.int64)
    for name in ordered:
        for delta in deltas(name):
            upper += torch.bincount(_bits(delta) >> _HALF, minlength=_BINS)
    wanted = math.floor(share * int(upper.sum()) + 0.5)
    if wanted == 0:
        return {name: Largest(1 << 32, 0) for name in ordered}  # no magnitude has such bits
    high, above = _bin_of(upper, wanted)
    lower = torch.zeros(len(ordered), _BINS, dtype=torch.int32)
    for row, name in zip(lower, ordered, strict=True):
        for delta in deltas(name):
            bits = _bits(delta)
            own = bits[bits >> _HALF == high] & (_BINS - 1)
            row += torch.bincount(own, minlength=_BINS).int()
    low, above_low = _bin_of(lower.sum(0), wanted - above)
    ties, found = wanted - above - above_low, {}
    for row, name in zip(lower, ordered, strict=True):
        own_ties = min(ties, int(row[low]))
        found[name] = Largest(high << _HALF | low, own_ties)
        ties -= own_ties
    return found


def _bits(delta: Tensor) -> Tensor:
    """Magnitudes ``[n]`` as integers in the same order: the bits of float32 without a sign."""
    return delta.abs().float().view(torch.int32).long()


def _bin_of(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The bin that the ``wanted``-th largest element is in, and how many are in the bins above."""
    from_top = counts.flip(0).cumsum(0)  # [bins], the highest first
    place = int(torch.searchsorted(from_top, wanted))
    return len(counts) - 1 - place, int(from_top[place] - counts[len(counts) - 1 - place])
