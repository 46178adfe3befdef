"""Order among units: shares as counts, selection, normalisation. Ties go to the lower index."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


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
    # All candidates, as in the first selection: a copy of some million scores is spared.
    values = key if len(candidates) == len(key) else key[candidates]  # [m]
    threshold = values.kthvalue(count).values
    chosen = values < threshold  # bool [m]
    ties = (values == threshold).nonzero().flatten()  # ascending, so that the lower index is taken
    chosen[ties[: count - int(chosen.sum())]] = True
    return candidates[chosen]


def without(candidates: Tensor, taken: Tensor, n: int) -> Tensor:
    """The candidates that were not taken, ``[left]``; both are sorted indices below n."""
    left = torch.zeros(n, dtype=torch.bool)
    left[candidates] = True
    left[taken] = False
    return left.nonzero().flatten()


def _exact_sums(x: Tensor) -> Tensor:
    """The sum of each row, exactly rounded: float64 [rows, n] -> [rows].

    The bits depend neither on the order of the additions nor on threads nor on the machine. From
    each row the leading bits of all values are taken, few enough that their sum is exact in
    whatever order, then the next bits, until nothing is left (Rump, Ogita & Oishi, Accurate
    floating-point summation, 2008: ExtractVector). The few partial sums are added by math.fsum.
    """
    rest, parts = x.clone(), []
    room = (x.shape[1] + 2).bit_length()  # 2^room values of one magnitude do not carry too far
    # Example: of 1, 2^-60 and -1 the first pass adds 1 - 1, the second 2^-60: nothing is lost.
    while bool((largest := rest.abs().amax(1)).any()):
        exponent = torch.frexp(largest).exponent.to(torch.int64) + room
        # 2^exponent by its bits, since pow may round; at least the smallest normal number.
        unit = ((exponent + 1023).clamp(min=1) << 52).view(torch.float64)[:, None]
        high = (rest + unit) - unit
        parts.append(high.sum(1))
        rest -= high
    if not parts:
        return torch.zeros(len(x), dtype=torch.float64)
    rows = torch.stack(parts, 1).tolist()
    return torch.tensor([math.fsum(row) for row in rows], dtype=torch.float64)


def _zscores(x: Tensor) -> Tensor:
    """(x - mean) / standard deviation of each row, ddof 0; zero where a row is constant.

    float64 [rows, n]. Deviations are scaled first, so that squares of tiny scores do not underflow.
    """
    n = x.shape[1]
    constant = x.amin(1) == x.amax(1)
    if bool(x.abs().max() > 2.0**900):  # else their sum might overflow
        x = x * 2.0**-200
    deviation = x - (_exact_sums(x) / n)[:, None]
    deviation[constant] = 1.0  # to divide by something
    deviation /= deviation.abs().amax(1, keepdim=True)
    variance = (_exact_sums(deviation * deviation) / n).tolist()
    # torch's own root may be of another library, and not exactly rounded.
    roots = torch.tensor([math.sqrt(each) for each in variance], dtype=torch.float64)
    deviation /= roots[:, None]
    deviation[constant] = 0.0
    return deviation


def _ranks(x: Tensor) -> Tensor:
    """position / (n - 1) of each row in ascending order; equal values: the lower index comes first.

    [rows, n]. A single unit has position 0, and rank 0.
    """
    rows, n = x.shape
    places = torch.arange(n, dtype=torch.float64).expand(rows, n)
    positions = torch.empty(rows, n, dtype=torch.float64)
    positions.scatter_(1, x.argsort(dim=1, stable=True), places)
    return positions / max(n - 1, 1)


_AT_ONCE = 1 << 17  # scores: what is computed of them stays in the cache


def normalized(scores: Mapping[str, Tensor], normalize: str) -> dict[str, Tensor]:
    """The scores ``[n_units]`` of each module, normalised by themselves.

    Modules of one size are taken together: a mixture has thousands of modules, so that a call for
    each would take longer than the work.
    """
    if normalize == "none":
        return dict(scores)
    rule = _zscores if normalize == "zscore" else _ranks
    of_size: dict[int, list[str]] = {}
    for name, score in scores.items():
        of_size.setdefault(len(score), []).append(name)
    found: dict[str, Tensor] = {}
    for size, names in of_size.items():
        step = max(1, _AT_ONCE // size)
        for start in range(0, len(names), step):
            some = names[start : start + step]
            rows = rule(torch.stack([scores[name] for name in some]))  # [modules, units]
            found.update(zip(some, rows.unbind(0), strict=True))
    return {name: found[name] for name in scores}


def blocks(names: Sequence[str], scope: str) -> list[list[str]]:
    """Modules that are ranked together."""
    return [list(names)] if scope == "model" else [[name] for name in names]


def split(chosen: Tensor, names: Sequence[str], sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Sorted indices ``[n]`` into all modules in turn, as those ``[n of it]`` into each module."""
    ends = torch.tensor([sizes[name] for name in names]).cumsum(0)
    bounds = [0, *torch.searchsorted(chosen, ends).tolist()]
    starts = [0, *ends.tolist()]
    return {name: chosen[bounds[i] : bounds[i + 1]] - starts[i] for i, name in enumerate(names)}


def order_key(
    safety: Mapping[str, Tensor], utility: Mapping[str, Tensor], names: Sequence[str], by: str
) -> Tensor:
    """What units are ordered by: float64 ``[units]``, the modules in `names` in turn."""
    s = torch.cat([safety[name] for name in names])
    u = torch.cat([utility[name] for name in names])
    return {"safety": s, "utility": u, "difference": s - u, "sum": s + u}[by]
