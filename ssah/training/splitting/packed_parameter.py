"""The trained slice of a packed weight, which notices that it was given other memory.

A packed slice is a view of its weight's storage (`ssah.training.splitting.split_tensor`), so that a
step changes what the forward pass reads. ``slice.data = other`` ends that: an average of weights
that is swapped in, ``vector_to_parameters``, an optimiser that flattens what it holds. From then on
the values have to be copied into the storage before each use, and somebody must notice. Addresses
tell, but the compiler cannot compare them; it does know attributes of Python.

Example, a model that was compiled, and the swap that an evaluation of averaged weights makes:

    backup = slice.data       a view of the storage
    slice.data = average      `SplitTensor.part` is called: the storage is now a copy, and swapped
    model(x)                  compiled anew, once: copies the average into the storage
    slice.data = backup       holds what it held: only the copy was written to
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class PackedParameter(nn.Parameter):
    """A parameter ``[trained, ...]`` over some rows of a storage.

    Attributes:
        on_swap: called once ``data`` was assigned; None of a copy until it is known.
    """

    on_swap: Callable[[], None] | None = None

    # Not a property: the compiler reads ``data`` of a tensor, and would not read through one.
    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "data" and self.on_swap is not None:
            self.on_swap()

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Saved by itself it is an ordinary parameter, which any program can read.
        return nn.Parameter(self.detach(), self.requires_grad).__reduce_ex__(protocol)
