"""Indices in modules as positions among all units of a scope, the modules one after the other.

Example: over ``{"a": 5, "b": 3}`` the units 1 and 4 of a and 0 of b are at [1, 4, 5].
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def checked_size(name: str, size: int) -> int:
    """How many units module ``name`` has.

    Raises:
        ValueError, TypeError: it is no whole number of 0 or more.
    """
    number = operator.index(size)  # TypeError: it is no integer
    if number < 0:
        raise ValueError(f"sizes has {number} units for {name!r}, must have 0 or more")
    return number


def flattened(indices: Mapping[str, Tensor | Sequence[int]], sizes: Mapping[str, int]) -> Tensor:
    """Indices in modules as sorted positions among all units: int64 ``[units]``, each once.

    Raises:
        ValueError: an index is out of range, or no integer; its module is named.
    """
    given = [_integers(name, indices[name]) for name in sizes if name in indices]
    if not given:
        return torch.zeros(0, dtype=torch.int64)
    names = [name for name in sizes if name in indices]
    starts = torch.tensor([0, *sizes.values()]).cumsum(0)[:-1]
    start_of = dict(zip(sizes, starts.tolist(), strict=True))
    counts = torch.tensor([len(each) for each in given])
    index = torch.cat(given)  # [indices of all modules]
    # One pass over all of them: a mixture has thousands of modules, and a check for each is slow.
    bounds = torch.tensor([sizes[name] for name in names]).repeat_interleave(counts)
    wrong = ((index < 0) | (index >= bounds)).nonzero()[:, 0]
    if len(wrong):
        # The module that the first wrong index came from, for the message.
        at = int(torch.searchsorted(counts.cumsum(0), wrong[0], right=True))
        own, name = given[at], names[at]
        raise ValueError(
            f"indices of {name!r} run from {int(own.min())} to {int(own.max())}, "
            f"must be in [0, {sizes[name]})"
        )
    flat = index + torch.tensor([start_of[name] for name in names]).repeat_interleave(counts)
    ascending = bool((flat.diff() > 0).all())  # as of most callers: no sort is needed
    return flat if ascending else torch.unique(flat, sorted=True)


def _integers(name: str, index: Tensor | Sequence[int]) -> Tensor:
    # An empty list would become float32.
    tensor = torch.as_tensor(index, dtype=None if len(index) else torch.int64, device="cpu")
    if tensor.dim() != 1 or tensor.dtype == torch.bool or tensor.is_floating_point():
        raise ValueError(
            f"indices of {name!r} have dtype {tensor.dtype} and {tensor.dim()} dimensions, must be "
            "one dimension of integers (for a mask: mask.nonzero()[:, 0])"
        )
    return tensor.to(torch.int64)
