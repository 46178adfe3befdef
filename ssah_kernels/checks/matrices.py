"""Tensors of any number of dimensions as matrices: what the kernels of updates take.

    parameter               dims    matrix
    [a], or of no dimension 0       [1, a]                   units are columns
    [a, b, c]               0       [a, b c]                 units are rows
    [a, b, c]               -1      [a b, c]                 units are columns

An example: eight experts [8, 64, 32] whose last dimension trains are one matrix [512, 32], and one
launch updates them all.

Where the strides of a parameter allow no such view (``channels_last`` weights, transposed stacks of
experts), its trained elements are copied, updated and written back. Nothing else of it is written.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..schema import KERNELS, arguments

_NAMES = {op: [name for _, name in arguments(op)] for op in KERNELS}
# Where the indices of an update stand among its arguments; its parameters are the first.
_INDICES_AT = {
    op: names.index("indices")
    for op, names in _NAMES.items()
    if "dims" in names and "params" in names
}


def as_matrix(x: Tensor, dim: int) -> Tensor:
    """``x`` as a view [rows, columns] that keeps ``dim``, its first or last dimension."""
    shape = x.shape
    if len(shape) == 2:
        return x
    if len(shape) < 2:
        return x.view(1, x.numel())  # [1, units]
    if dim % len(shape) == 0:
        return x.view(shape[0], math.prod(shape[1:]))  # [units, others]
    return x.view(math.prod(shape[:-1]), shape[-1])  # [others, units]


def axis_of(x: Tensor, dim: int) -> int:
    """Which of the matrix's two dimensions ``dim`` of ``x`` [...] became."""
    n = x.dim()
    return int(n < 2 or dim % n > 0)  # one dimension becomes [1, units]: columns


def can_be_matrix(x: Tensor, dim: int) -> bool:
    """Whether the dimensions of ``x`` [...] that become one lie one within the other."""
    n = x.dim()
    if n < 3:
        return True
    shape, strides = x.shape, x.stride()
    merged = range(1, n) if dim % n == 0 else range(n - 1)
    outer = [d for d in merged if shape[d] != 1]  # the stride of a dimension of 1 means nothing
    return 0 in shape or all(
        strides[a] == strides[b] * shape[b] for a, b in itertools.pairwise(outer)
    )


class Copies:
    """The trained elements of those parameters of an update that are no matrices."""

    def __init__(self, ready: Sequence[Any], indices_at: int) -> None:
        params, indices, axes = ready[0], ready[indices_at], ready[indices_at + 1]
        self.copies: list[tuple[Tensor, Tensor | None, int, Tensor]] = []
        odd = [i for i, p in enumerate(params) if p.dim() != 2]
        self.ready = list(ready)
        if not odd:
            return
        params, indices = list(params), list(indices)
        for i in odd:
            param, index = params[i], indices[i]
            dim = 0 if axes[i] == 0 else param.dim() - 1
            # [..., trained] or [trained, ...]: compact, so that no index is left to apply.
            copy = (param if index is None else param.index_select(dim, index)).contiguous()
            self.copies.append((param, index, dim, copy))
            params[i], indices[i] = as_matrix(copy, dim), None
        self.ready[0], self.ready[indices_at] = params, indices

    def write_back(self) -> None:
        for param, index, dim, copy in self.copies:
            if index is None:
                param.copy_(copy)
            else:
                param.index_copy_(dim, index, copy)


def run(
    op: str, kernel: Callable[..., Any], ready: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """What ``kernel`` gives for arguments that were checked.

    Args:
        op: the operator.
        kernel: it on one backend.
        ready: its arguments, as the checks return them.
        kwargs: the other arguments.
    """
    if op not in _INDICES_AT:
        return kernel(*ready, **kwargs)
    copies = Copies(ready, _INDICES_AT[op])
    result = kernel(*copies.ready, **kwargs)
    copies.write_back()
    return result
