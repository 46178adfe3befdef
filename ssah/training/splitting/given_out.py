"""Copies that ``state_dict`` gave away, and whether somebody writes to them.

The values of a module's ``state_dict`` are its parameters: what is written to them, the module has.
Of a weight that a plan has split they are a copy, so that the write is lost. Recipes for an average
of weights write there:

    for average, value in zip(ema.state_dict().values(), model.state_dict().values()):
        average.copy_(0.9 * average + 0.1 * value)      # ema never changes

torch counts the writes to each tensor, and all of its views have one count. A view whose memory is
taken away keeps the count alone, so that it can be asked later, whatever became of the copy.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor


class GivenOut:
    """The counts of the copies that were given away last."""

    def __init__(self) -> None:
        self._counts: list[tuple[str, Tensor, int]] = []

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Watch other copies from now on: name in the state -> the copy, of any shape."""
        self.check()
        for name, value in values.items():
            if not value.is_inference():  # of these torch counts nothing, and refuses most writes
                count = value.detach()
                count.data = torch.empty(0)
                self._counts.append((name, count, count._version))

    def check(self) -> None:
        """Warn, once, if one of them was written to; they are forgotten then."""
        if torch.compiler.is_compiling():
            return  # counts are nothing that the compiler knows
        written = [name for name, count, before in self._counts if count._version != before]
        self._counts.clear()
        if written:
            warnings.warn(
                f"{written[0]!r} of a state_dict() was written to, which changed a copy and not "
                "the model: a plan has split this weight. For an average of weights use "
                "torch.optim.swa_utils.AveragedModel, or give the changed state to "
                "load_state_dict(); a copy of your own is state_dict()[...].clone()",
                UserWarning,
                stacklevel=2,
            )
