"""Masks that broadcast: bool tensors of size 1 along every dimension in which they do not change.

Columns 0 and 2 of a weight ``[2, 3]`` are [[1, 0, 1]], the whole weight is [[1]], and its entries
(0, 0) and (1, 2) are [[1, 0, 0], [0, 0, 1]]. So rows of a weight of 4096 x 11008 take 512 bytes,
and only what is neither rows nor columns takes a bit for each entry. Every set of entries has
exactly one such mask: along a dimension it either changes or does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ssah.units import BitMask


def narrowed(values: Tensor) -> Tensor:
    """``values`` ``[...]`` with size 1 along every dimension in which nothing changes: a view."""
    for dim, (size, stride) in enumerate(zip(values.shape, values.stride(), strict=True)):
        if size > 1:
            first = values.narrow(dim, 0, 1)
            # Expanded, nothing can change along it: that is known without a look.
            if stride == 0 or bool((values == first).all()):
                values = first
    return values


def bits_of(mask: Tensor) -> BitMask:
    """The narrow mask that has the entries of ``mask``, bool ``[...]``."""
    return BitMask.of(narrowed(mask))


def whole(dims: int) -> BitMask:
    """All entries of a parameter with so many dimensions."""
    return BitMask.of(torch.ones([1] * dims, dtype=torch.bool))


def none(dims: int) -> BitMask:
    """No entry of a parameter with so many dimensions."""
    return BitMask.of(torch.zeros([1] * dims, dtype=torch.bool))


def combined(a: BitMask, b: BitMask, rule: Callable[[BitMask, BitMask], BitMask]) -> BitMask:
    """``rule`` of two masks of one parameter, such as `operator.or_`, as a narrow mask."""
    if a.shape != b.shape:  # rows of one and columns of the other, for instance
        shape = torch.broadcast_shapes(a.shape, b.shape)
        a, b = (BitMask.of(each.to_mask().expand(shape)) for each in (a, b))
    return bits_of(rule(a, b).to_mask())


def count(mask: BitMask, shape: Sequence[int]) -> int:
    """How many entries of a parameter of this shape ``mask`` has."""
    return mask.count * (torch.Size(shape).numel() // max(mask.numel, 1))
