"""Order among units: shares as counts, selection, normalisation. Ties go to the lower index."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["blocks", "lowest", "normalized", "order_key", "share_count", "split", "without"]


def share_count(share: float, n: int) -> int:
    """How many of n units a share is: floor(share * n + 0.5)."""
    return math.floor(share * n + 0.5)


def lowest(key: Tensor, candidates: Tensor, count: int) -> Tensor:
    """The `count` candidates with the lowest key, ties to the lower index.

    key: float64 [n]; candidates: sorted int64 [m]. Returns a sorted int64 tensor of min(count, m)
    indices into key. A selection in O(n) in place of a sort.
    """
    count = min(count, len(candidates))
    if count == 0:
        return candidates[:0]
    values = key[candidates]
    threshold = values.kthvalue(count).values
    chosen = values < threshold
    ties = (values == threshold).nonzero().flatten()
    chosen[ties[: count - int(chosen.sum())]] = True
    return candidates[chosen]


def without(candidates: Tensor, taken: Tensor, n: int) -> Tensor:
    """The candidates that were not taken, both sorted indices below n."""
    left = torch.zeros(n, dtype=torch.bool)
    left[candidates] = True
    left[taken] = False
    return left.nonzero().flatten()


def _zscore(x: Tensor) -> Tensor:
    """(x - mean) / standard deviation, ddof 0; all zero where x is constant.

    The sums are exactly rounded, so that the bits depend neither on threads nor on the machine,
    and deviations are scaled first, so that squares of tiny scores do not underflow.
    """
    if bool(x.min() == x.max()):
        return torch.zeros_like(x)
    deviation = x - math.fsum(x.tolist()) / len(x)
    deviation = deviation / deviation.abs().max()
    variance = math.fsum((deviation * deviation).tolist()) / len(x)
    return deviation / math.sqrt(variance)


def _rank(x: Tensor) -> Tensor:
    """position / (n - 1) in ascending order; equal values: the lower index comes first.

    A single unit has position 0, and rank 0.
    """
    positions = torch.empty(len(x), dtype=torch.float64)
    positions[x.argsort(stable=True)] = torch.arange(len(x), dtype=torch.float64)
    return positions / max(len(x) - 1, 1)


def normalized(scores: Mapping[str, Tensor], normalize: str) -> dict[str, Tensor]:
    """The scores of each module, normalised by themselves."""
    if normalize == "zscore":
        return {name: _zscore(x) for name, x in scores.items()}
    if normalize == "rank":
        return {name: _rank(x) for name, x in scores.items()}
    return dict(scores)


def blocks(names: Sequence[str], scope: str) -> list[list[str]]:
    """Modules that are ranked together."""
    return [list(names)] if scope == "model" else [[name] for name in names]


def split(chosen: Tensor, names: Sequence[str], sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Sorted indices into the concatenation of modules, given back to each module."""
    ends = torch.tensor([sizes[name] for name in names]).cumsum(0)
    bounds = [0, *torch.searchsorted(chosen, ends).tolist()]
    starts = [0, *ends.tolist()]
    return {name: chosen[bounds[i] : bounds[i + 1]] - starts[i] for i, name in enumerate(names)}


def order_key(
    safety: Mapping[str, Tensor], utility: Mapping[str, Tensor], names: Sequence[str], by: str
) -> Tensor:
    """What units are ordered by: float64, the modules in `names` one after the other."""
    s = torch.cat([safety[name] for name in names])
    u = torch.cat([utility[name] for name in names])
    return {"safety": s, "utility": u, "difference": s - u, "sum": s + u}[by]
