"""The change of a weight on a few rows or columns, as a product of two matrices that is exact.

LoRA adds B A to a weight ``[out, in]``, with B ``[out, r]`` and A ``[r, in]``. Where only columns
j of the weight changed, let row k of A be zero except for a one at j_k, and column k of B be the
change of column j_k. Where only rows i changed, the reverse. The product has one summand for each
element, so that it is the change itself, whatever the order of sums. Example: of a weight
``[2, 4]`` columns 1 and 3 changed:

    change   0 5 0 7      B   5 7      A   0 1 0 0
             0 6 0 8          6 8          0 0 0 1

The rank is the number of columns, or of rows where these are fewer. The change itself is t - w,
rounded to float32. Added to w and rounded to the dtype of the weight it gives t bit for bit where
t is at least about as large as w, or zero, and in bfloat16 and float16 nearly always. In float32 a
t that is much smaller than w lies between two sums; `Factors` counts these elements.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Factors:
    """A change as B A.

    Attributes:
        a: ``[rank, in]``.
        b: ``[out, rank]``.
        changed: how many elements of the weight changed.
        inexact: of how many the sum of weight and change, rounded, is not the tuned value.
        error: the largest difference among these, in the units of the weight.
    """

    a: Tensor
    b: Tensor
    changed: int
    inexact: int
    error: float

    @property
    def rank(self) -> int:
        """The inner dimension."""
        return len(self.a)


def factors(weight: Tensor, tuned: Tensor) -> Factors | None:
    """The change from ``weight`` ``[out, in]`` to ``tuned`` as a product; None where there is none.

    The factors have float32, or the dtype of the weight where that is wider. Both are finite.
    """
    differs = weight != tuned
    rows, columns = (differs.any(dim).nonzero()[:, 0] for dim in (1, 0))
    if not len(rows):
        return None
    by_columns = len(columns) <= len(rows)
    index = columns if by_columns else rows  # [rank]
    before, after = (each.index_select(int(by_columns), index) for each in (weight, tuned))
    dtype = torch.promote_types(weight.dtype, torch.float32)
    change = (after.double() - before.double()).to(dtype)
    # As PEFT merges: the sum is made in the wider type, and rounded once.
    merged = (before.to(dtype) + change).to(weight.dtype)
    error = (merged.double() - after.double()).abs()
    one_hot = torch.zeros(len(index), weight.shape[int(by_columns)], dtype=dtype)
    one_hot[torch.arange(len(index)), index.cpu()] = 1
    change = change.cpu()
    a, b = (one_hot, change) if by_columns else (change, one_hot.t())
    return Factors(a, b, int(differs.sum()), int((error != 0).sum()), float(error.max()))
