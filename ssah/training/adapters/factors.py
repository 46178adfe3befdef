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
        index: int64 ``[rank]``, the rows or columns that changed.
        by_columns: whether they are columns.
        change: of these, ``[rank, in]`` or ``[out, rank]``.
        size: how many rows, or columns, the weight has.
        changed: how many elements of the weight changed.
        inexact: of how many the sum of weight and change, rounded, is not the tuned value.
        error: the largest difference among these, in the units of the weight.
    """

    index: Tensor
    by_columns: bool
    change: Tensor
    size: int
    changed: int
    inexact: int
    error: float

    @property
    def rank(self) -> int:
        """The inner dimension."""
        return len(self.index)

    @property
    def a(self) -> Tensor:
        """A, ``[rank, in]``."""
        return self._one_hot() if self.by_columns else self.change

    @property
    def b(self) -> Tensor:
        """B, ``[out, rank]``."""
        return self.change if self.by_columns else self._one_hot().t()

    def _one_hot(self) -> Tensor:
        # Not before it is asked for: of a weight that changed as a whole it is as large as that.
        matrix = torch.zeros(self.rank, self.size, dtype=self.change.dtype)
        matrix[torch.arange(self.rank), self.index] = 1
        return matrix  # [rank, size]


def factors(weight: Tensor, tuned: Tensor) -> Factors | None:
    """The change from ``weight`` ``[out, in]`` to ``tuned`` as a product; None where there is none.

    The factors have float32, or the dtype of the weight where that is wider. Both are finite.
    """
    differs = weight != tuned
    rows, columns = (differs.any(dim).nonzero()[:, 0] for dim in (1, 0))
    if not len(rows):
        return None
    by_columns = len(columns) <= len(rows)
    index, dim = (columns, 1) if by_columns else (rows, 0)  # [rank]
    before, after = (each.index_select(dim, index) for each in (weight, tuned))
    dtype = torch.promote_types(weight.dtype, torch.float32)
    change = (after.double() - before.double()).to(dtype)
    # As PEFT merges: the sum is made in the wider type, and rounded once.
    merged = (before.to(dtype) + change).to(weight.dtype)
    error = (merged.double() - after.double()).abs()
    return Factors(
        index.cpu(),
        by_columns,
        change.cpu(),
        weight.shape[dim],
        changed=int(differs.sum()),
        inexact=int((error != 0).sum()),
        error=float(error.max()),
    )
