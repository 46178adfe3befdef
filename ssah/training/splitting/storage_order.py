"""In which order the entries of a weight are stored, and what is cut out of it.

Entries are rows or columns of a weight ``[out, in]``, or of experts ``[experts, rows, columns]``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def unit_major(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    """``values`` as ``[entries, ...]``: its entries are those of the dimensions ``dims``, in order.

    One dimension gives a view: of B's weight ``[out, units]``, (1,) gives ``[units, out]``. Of a
    parameter of experts ``[experts, rows, columns]``, (0, 2) gives ``[experts * columns, rows]``,
    the entries of the first expert, then those of the second; a copy where memory is in another
    order.
    """
    return values.movedim(dims, tuple(range(len(dims)))).flatten(0, len(dims) - 1)


def complement_rows(weight: Tensor, dims: tuple[int, ...], index: Tensor) -> Tensor:
    """What of ``weight`` is not in ``index`` along ``dims``: unit-major, in ascending order.

    Example: of a weight ``[out, 4]`` with dims (1,) and index ``[1, 3]``, columns 0 and 2 as
    ``[2, out]``.
    """
    rows = unit_major(weight.detach(), dims)  # [entries, ...]
    keep = torch.ones(len(rows), dtype=torch.bool)
    keep[index] = False
    return rows.index_select(0, keep.nonzero()[:, 0].to(weight.device))


def trained_first(trains: Tensor) -> Tensor:
    """The order in which what trains comes first, each in ascending order.

    Args:
        trains: bool ``[n]``.

    Returns:
        int64 ``[n]``: for [no, yes, no, yes] 1, 3, 0, 2.
    """
    return torch.cat([trains.nonzero()[:, 0], (~trains).nonzero()[:, 0]])


def runs(positions: Tensor) -> list[tuple[int, int]]:
    """The stretches (start, stop) of consecutive integers in ``positions`` ``[n]``, in order.

    Example: 4, 5, 6, 9 gives (4, 7) and (9, 10).
    """
    if len(positions) == 0:
        return []
    breaks = (positions.diff() != 1).nonzero()[:, 0] + 1
    pieces = positions.tensor_split(breaks.cpu())
    return [(int(piece[0]), int(piece[-1]) + 1) for piece in pieces]
