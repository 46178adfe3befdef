"""The values of ``indices`` and of ``arm``: read once a tensor, and again only after a change.

Reading them waits for a GPU. An optimiser's are read when it is made, so that its steps do not.

Indices must increase strictly. An entry that stood twice would be updated by two programs at once;
and of an increasing index, such as [3, 5, 9], the first and the last tell whether all are in range.
Arms, such as [2, 0, 0], may stand in any order and as often as wanted.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor

# What differs where values do: the version, and where the tensor lies and how long it is. Whatever
# is assigned to its ``data`` has the version of what was there.
State: TypeAlias = tuple[int, int, int]
# id of a tensor -> the tensor, its state, its smallest and its largest value
Known: TypeAlias = dict[int, tuple[weakref.ref[Tensor], State, int, int]]
_known: Known = {}
# Of those in any order, which say nothing of whether they increase.
_known_arms: Known = {}


def state_of(x: Tensor) -> State:
    """What tells whether the values of ``x`` [...] may have changed, without a look at them."""
    return x._version, x.data_ptr(), x.numel()


def _keep(known: Known, index: Tensor, low: int, high: int) -> None:
    """Remember the bounds of ``index`` [...] for as long as it lives and stays as it is."""
    if not index.is_inference():  # one that was made in inference mode has no version
        # An id is given again once its tensor is gone: the entry must go with it.
        number = id(index)
        forget = weakref.ref(index, lambda _: known.pop(number, None))
        known[number] = (forget, state_of(index), low, high)


def _kept(known: Known, index: Tensor) -> tuple[int, int] | None:
    """The bounds of ``index`` [...] that are still those, or None."""
    entry = known.get(id(index))
    if entry is None or entry[0]() is not index or entry[1] != state_of(index):
        return None
    return entry[2:]


def bounds(name: str, index: Tensor) -> tuple[int, int]:
    """The smallest and the largest of ``index``, int64 [n]; of an empty one 0 and -1.

    Raises:
        ValueError: it does not increase strictly.
    """
    if index.numel() == 0:
        return 0, -1
    falls = (index[1:] <= index[:-1]).nonzero()  # [falls, 1]
    if len(falls):
        at = int(falls[0])
        before, value = int(index[at]), int(index[at + 1])
        raise ValueError(
            f"{name} has {value} after {before} at position {at + 1}; it must be strictly "
            "increasing"
        )
    low, high = int(index[0]), int(index[-1])
    _keep(_known, index, low, high)
    return low, high


def check(indices: Sequence[Tensor | None], tensors: Sequence[Tensor], dims: Sequence[int]) -> None:
    """Raise ValueError, with the position in the list, unless every index [n] fits its tensor."""
    for i, index in enumerate(indices):
        if index is None:
            continue
        low, high = _kept(_known, index) or bounds(f"indices[{i}]", index)
        check_range(f"indices[{i}]", low, high, tensors[i].size(dims[i]))


def check_arms(arm: Tensor, n_arms: int) -> None:
    """Raise ValueError unless every arm [...] is one of ``n_arms``."""
    known = _kept(_known_arms, arm)
    if known is None:
        low, high = (int(each) for each in arm.aminmax()) if arm.numel() else (0, -1)
        _keep(_known_arms, arm, low, high)
    else:
        low, high = known
    check_range("arm", low, high, n_arms)


def check_range(name: str, low: int, high: int, size: int) -> None:
    """Raise ValueError unless :func:`bounds` of an index stay within a dimension of ``size``."""
    if low < 0 or high >= size:
        raise ValueError(f"{name} goes from {low} to {high}; it must stay within 0 to {size - 1}")
