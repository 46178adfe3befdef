"""The values of ``indices``: read once a tensor, and again only after it was changed.

Reading them waits for a GPU. An optimiser's are read when it is made, so that its steps do not.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from torch import Tensor

# id of a tensor -> the tensor, its version, its smallest and its largest value
_known: dict[int, tuple[weakref.ref[Tensor], int, int, int]] = {}


def bounds(name: str, index: Tensor) -> tuple[int, int]:
    """The smallest and the largest of ``index``, int64 [n]; of an empty one 0 and -1.

    Raises:
        ValueError: it does not increase strictly.
    """
    number = id(index)
    known = _known.get(number)
    version = -1 if index.is_inference() else index._version
    if known is not None and known[0]() is index and known[1] == version >= 0:
        return known[2], known[3]
    if index.numel() == 0:
        return 0, -1
    falls = (index[1:] <= index[:-1]).nonzero()
    if len(falls):
        at = int(falls[0])
        raise ValueError(
            f"{name} has {int(index[at + 1])} after {int(index[at])} at position {at + 1}; it must "
            "be strictly increasing"
        )
    ends = int(index[0]), int(index[-1])
    _known[number] = (weakref.ref(index, lambda _: _known.pop(number, None)), version, *ends)
    return ends


def check(indices: Sequence[Tensor | None], tensors: Sequence[Tensor], dims: Sequence[int]) -> None:
    """Raise ValueError, with the position in the list, unless every index fits its tensor."""
    for i, (index, tensor, dim) in enumerate(zip(indices, tensors, dims, strict=True)):
        if index is not None:
            low, high = bounds(f"indices[{i}]", index)
            if low < 0 or high >= tensor.shape[dim]:
                raise ValueError(
                    f"indices[{i}] goes from {low} to {high}; it must stay within 0 to "
                    f"{tensor.shape[dim] - 1}"
                )
