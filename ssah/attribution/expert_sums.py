"""Sums over the tokens of every routed expert of a layer.

What enters the experts' B is ``[pairs, n_units]``, sorted by expert. On the host each expert's rows
go through the operators that any module's do. On a device the host does not know whose rows are
where, and need not: all experts are summed at once, each over its own rows,

    n_e = counted rows of e    mean_e = sum a / n_e    M2_e = sum (a - mean_e)^2

in float64, and merged into the state by Chan's formula. A row that does not count is taken out
before, even if it is NaN.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ssah.attribution.sums import Sums
from ssah.units import Routing
from ssah_kernels import ops
from ssah_kernels.reference.channel_moments import merge_moments_

_ELEMENTS_AT_ONCE = 2**24  # in float64 128 MiB, of which there are up to four


def add_moments_(sums: Sums, a: Tensor, routing: Routing, counted: Tensor | None) -> None:
    """Merge count, mean and M2 of every expert's rows into ``sums``.

    Args:
        sums: of all experts, ``[experts, n_units]``.
        a: ``[pairs, n_units]``.
        routing: whose the pairs are.
        counted: bool ``[pairs]``, or None where every pair counts.
    """
    if a.device.type == "cpu":
        for expert, (start, end) in enumerate(routing.spans):
            if end > start:
                own, mask = sums.of_expert(expert), _rows(counted, start, end)
                ops.channel_moments_(a[start:end], own.count, own.mean, own.m2, mask)
        return
    ones = a.new_ones(len(a), 1, dtype=torch.float64)
    n = _total(_masked(ones, counted), routing)  # [experts, 1]
    for columns in _columns(a):
        wide = _masked(a[:, columns].double(), counted)  # [pairs, at once]
        mean = _total(wide, routing) / n.clamp(min=1)  # [experts, at once]
        deviations = _masked(wide - mean[routing.expert], counted)
        m2 = _total(deviations.square_(), routing)
        # A copy: the count goes up once, after the last columns.
        count = sums.count[:, None].expand_as(mean).clone()
        merge_moments_(count, sums.mean[:, columns], sums.m2[:, columns], n, mean, m2)
    sums.count.add_(n[:, 0])


def add_gradients_(
    sums: Sums, a: Tensor, grad: Tensor, routing: Routing, counted: Tensor | None
) -> None:
    """Add a * dL/da and its square, over every expert's rows; arguments as :func:`add_moments_`.

    ``grad``: ``[pairs, n_units]``.
    """
    if a.device.type == "cpu":
        for expert, (start, end) in enumerate(routing.spans):
            if end > start:
                own, mask = sums.of_expert(expert), _rows(counted, start, end)
                rows = a[start:end], grad[start:end]
                ops.taylor_moments_(*rows, own.signed, own.squared, mask)
        return
    for columns in _columns(a):
        product = a[:, columns].double() * grad[:, columns].double()
        product = _masked(product, counted)  # [pairs, at once]
        sums.signed[:, columns] += _total(product, routing)
        sums.squared[:, columns] += _total(product.square_(), routing)


def _rows(counted: Tensor | None, start: int, end: int) -> Tensor | None:
    """The mask ``[pairs]`` of some pairs."""
    return None if counted is None else counted[start:end]


def _masked(rows: Tensor, counted: Tensor | None) -> Tensor:
    """``rows`` ``[pairs, n]``, 0 where they do not count."""
    return rows if counted is None else torch.where(counted[:, None], rows, 0.0)


def _total(rows: Tensor, routing: Routing) -> Tensor:
    """Over every expert's rows of ``[pairs, n]``: ``[experts, n]``, in a fixed order."""
    starts = torch.nn.functional.pad(routing.ends, (1, 0))  # [experts + 1]
    return torch.segment_reduce(rows, "sum", offsets=starts, axis=0, unsafe=True, initial=0)


def _columns(a: Tensor) -> Iterator[slice]:
    """The columns of ``a`` ``[pairs, n]``, some at a time."""
    size = max(1, _ELEMENTS_AT_ONCE // max(1, len(a)))
    for start in range(0, a.shape[1], size):
        yield slice(start, start + size)
