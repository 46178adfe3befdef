"""Tokens sorted by the expert that they go to, and the products of all experts at once.

Example: token 0 chose experts 1 and 0, token 1 chose 1 and 2. Sorted by expert, the pairs are

    pair      0   1   2   3
    expert    0   1   1   2      ends = [1, 3, 4]
    token     0   0   1   1

Every expert has the pairs between two ends as its rows, and a matrix of its own. One grouped
product of torch multiplies them all. Who has how many rows stays on the device, so that nobody
waits for it. Sizes and types that it does not take are multiplied one expert after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ALIGNMENT = 16  # bytes, of rows and of where they begin


@dataclass(frozen=True, eq=False)
class Routing:
    """Which pair of a token and an expert is which, sorted by expert.

    Attributes:
        order: int64 ``[pairs]``, pair p is choice ``order[p] % k`` of token ``order[p] // k``.
        expert: ``[pairs]``, ascending.
        token: int64 ``[pairs]``, ascending within an expert.
        ends: int32 ``[experts]``, where the pairs of each expert end.
        k: experts of a token.
    """

    order: Tensor
    expert: Tensor
    token: Tensor
    ends: Tensor
    k: int

    @classmethod
    def of(cls, chosen: Tensor, n_experts: int) -> Routing:
        """Sort the choices, integers ``[tokens, k]`` below ``n_experts``."""
        # Stable: the tokens of one expert stay ascending.
        expert, order = chosen.flatten().sort(stable=True)  # [tokens * k] each
        numbers = torch.arange(n_experts, dtype=expert.dtype, device=expert.device)
        ends = torch.searchsorted(expert, numbers, right=True, out_int32=True)
        k = chosen.shape[1]
        return cls(order, expert, order // k, ends, k)

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """First pair of every expert and the one behind its last; the host waits for a GPU."""
        ends = self.ends.tolist()
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """The rows of every expert times its matrix: ``[pairs, in]`` to ``[pairs, out]``.

        Args:
            x: ``[pairs, in]``.
            weight: ``[experts, in, out]``.
        """
        dtype = product_dtype(x)
        x, weight = x.to(dtype), weight.to(dtype)
        if _grouped(x, weight):
            return F.grouped_mm(x, weight, offs=self.ends)
        matrices = weight.unbind()  # one gradient of all; of an index each would have the full size
        pieces = [x[a:b] @ own for own, (a, b) in zip(matrices, self.spans, strict=True) if b > a]
        return torch.cat(pieces) if pieces else x @ matrices[0]

    def gradient(self, left: Tensor, right: Tensor) -> Tensor:
        """``left' right`` over the rows of every expert: ``[experts, m, n]``; 0 without rows.

        Args:
            left: ``[pairs, m]``.
            right: ``[pairs, n]``.
        """
        if _grouped(left.t(), right):
            return F.grouped_mm(left.t(), right, offs=self.ends)
        return torch.stack([left[a:b].t() @ right[a:b] for a, b in self.spans])

    def weighed(self, out: Tensor, weights: Tensor) -> Tensor:
        """Sum over each token's experts of their weight times their output.

        Args:
            out: ``[pairs, hidden]``.
            weights: ``[tokens, k]``.

        Returns:
            ``[tokens, hidden]``, in the type of the product; in the order of a token's choices.
        """
        chosen = out[self.order.argsort()].unflatten(0, (-1, self.k))  # [tokens, k, hidden]
        return (chosen * weights[..., None]).sum(1)


def product_dtype(x: Tensor) -> torch.dtype:
    """The type in which ``x`` ``[...]`` is multiplied: autocast knows no grouped product."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _grouped(*matrices: Tensor) -> bool:
    """Whether torch has a grouped product of these two, ``[rows, k]`` and ``[..., k, n]``."""
    first = matrices[0]
    if first.dtype not in _GROUPED_DTYPES or not all(each.numel() for each in matrices):
        return False
    if first.is_cuda and torch.cuda.get_device_capability(first.device) < (8, 0):
        return False
    return all(map(_aligned, matrices))


def _aligned(matrix: Tensor) -> bool:
    """Whether ``[..., m, n]`` lies row by row or column by column, each at a multiple of 16 bytes.

    That of other layouts would be an error of torch.
    """
    *outer, row, column = matrix.stride()
    steps = (*outer, row if column == 1 else column)
    dense = 1 in (row, column) and min(steps) > 0
    size = matrix.element_size()
    if not dense or any(step * size % _ALIGNMENT for step in steps):
        return False
    # A compiler knows no address; what it allocates is aligned.
    return torch.compiler.is_compiling() or matrix.data_ptr() % _ALIGNMENT == 0
