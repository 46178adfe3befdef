"""Trained values of one parameter, and where in it they belong.

Example: of a B ``[out, 4]`` the columns 1 and 3 trained. Values are unit-major, as an update keeps
them: ``dims`` is (1,), ``index`` is ``[1, 3]`` and ``values`` ``[2, out]`` has column 1, column 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Placed:
    """Values of entries of one parameter of a model.

    Attributes:
        name: of the parameter.
        parameter: it.
        dims: the dimensions that entries run along, of experts two; None: all of it.
        index: int64 ``[entries]``, ascending; None: all of it.
        values: ``[entries, ...]``, or of the shape of the parameter.
    """

    name: str
    parameter: nn.Parameter
    dims: tuple[int, ...] | None
    index: Tensor | None
    values: Tensor

    def read(self) -> Tensor:
        """A copy of what the parameter has there now, ``[entries, ...]`` as ``values``."""
        weight = self.parameter.detach()
        return weight.clone() if self.dims is None else self._entries(weight)[self._place(weight)]

    def write(self, values: Tensor) -> None:
        """Put ``values`` ``[entries, ...]`` there, in place."""
        self._put(self.parameter.detach(), values)

    def written(self) -> Tensor:
        """A copy of the parameter, ``[...]`` of its shape, with ``values`` in it."""
        weight = self.parameter.detach().clone()
        self._put(weight, self.values)
        return weight

    def _put(self, weight: Tensor, values: Tensor) -> None:
        if self.dims is None:  # all of it, on whatever device it is
            weight.copy_(values)
        else:
            self._entries(weight)[self._place(weight)] = values.to(weight.device)

    def _entries(self, weight: Tensor) -> Tensor:
        """``[entries, ...]``, of experts ``[experts, entries, ...]``: a view, to write to."""
        assert self.dims is not None
        return weight.movedim(self.dims, tuple(range(len(self.dims))))

    def _place(self, weight: Tensor) -> tuple[Tensor, ...]:
        """``index`` as indices of the dimensions that entries run along."""
        assert self.dims is not None
        assert self.index is not None
        # Of experts an entry is numbered over all of them: it has an expert, and a place in it.
        sizes = self._entries(weight).shape[: len(self.dims)]
        return torch.unravel_index(self.index.to(weight.device), sizes)
