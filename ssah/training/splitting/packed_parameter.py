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

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from ssah.training.splitting.split_tensor import SplitTensor

__all__ = ["PackedParameter"]


class PackedParameter(nn.Parameter):
    """A parameter ``[trained, ...]`` over some rows of a storage.

    Attributes:
        slice_of: whose storage it aliases; None of a copy until it is known.
    """

    slice_of: SplitTensor | None = None

    # Not a property: the compiler reads ``data`` of a tensor, and would not read through one.
    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "data" and self.slice_of is not None:
            self.slice_of.part()

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Saved by itself it is an ordinary parameter, which any program can read.
        return nn.Parameter(self.detach(), self.requires_grad).__reduce_ex__(protocol)
