"""The sums of all ranks together: moments merged, gradient sums added, in float64."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ssah.attribution.watch import Sums
from ssah.distributed import Ranks
from ssah_kernels.reference.channel_moments import merge_moments_

__all__ = ["join"]

_UNITS_AT_ONCE = 2**18  # gathered at a time: 2 MiB a rank and sum


def join(ranks: Ranks, sums: Mapping[str, Sums], *, gradient: bool) -> None:
    """Replace every module's state by that of all ranks together: the same bits on each.

    (count, mean, M2) are merged by Chan's formula and the gradient sums are added, in float64
    and in the order of the ranks. Received: 16 bytes a unit and rank, 32 with ``gradient``.

    Raises:
        ValueError: all ranks hold the same state, so that they ran the same batches.
    """
    if ranks.size == 1:
        return
    states = list(sums.values())
    units = [len(state.mean) for state in states]
    counts = ranks.gather(torch.stack([state.count.cpu() for state in states]))
    module = torch.repeat_interleave(torch.tensor(units))  # [units], which one each is of
    fields = ("mean", "m2", "signed", "squared") if gradient else ("mean", "m2")
    flat = [torch.cat([getattr(state, field).cpu() for state in states]) for field in fields]
    same = bool((counts == counts[0]).all())
    for start in range(0, len(module), _UNITS_AT_ONCE):
        piece = slice(start, start + _UNITS_AT_ONCE)
        parts = [ranks.gather(values[piece]) for values in flat]  # [ranks, units] each
        same = same and all(bool((part == part[0]).all()) for part in parts)
        for values in flat:
            values[piece] = 0
        count = torch.zeros_like(flat[0][piece])
        mean, m2, *added = (values[piece] for values in flat)
        for rank, n in enumerate(counts[:, module[piece]]):
            merge_moments_(count, mean, m2, n, parts[0][rank], parts[1][rank])
            for total, part in zip(added, parts[2:], strict=True):
                total += part[rank]
    if same and bool(counts.any()):
        raise ValueError(
            f"loader yields the same batches on all {ranks.size} ranks, so that every token "
            "would count that often: give each rank its own, e.g. ssah.distributed.deal(loader)"
        )
    for i, state in enumerate(states):
        state.count.copy_(counts[:, i].sum())
    for field, values in zip(fields, flat, strict=True):
        for state, own in zip(states, values.split(units), strict=True):
            getattr(state, field).copy_(own)
