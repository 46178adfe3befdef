"""The columns of B that units own: where their output enters the model; and other entries.

A module computes f(X) = B sigma(A X), so that its output is the sum over units j of activation j
times column j of B. Without its column a unit puts out nothing, whatever its rows of A are.
Example: units {1, 3} of a down projection ``[hidden, 4]`` own ``weight[:, [1, 3]]``; of a Conv1D,
stored transposed, ``weight[[1, 3], :]``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from ssah.models import nonfinite
from ssah.units import BitMask, DepthTwoModule, UnitSet, check_units


class Part(Protocol):
    """Weights that are read, changed and put back: columns of B, or a whole parameter."""

    @property
    def param(self) -> str:
        """The name of the parameter in the model."""

    @property
    def owner(self) -> nn.Module:
        """The module that holds it."""

    def read(self) -> Tensor:
        """A copy of the values, ``[...]``."""

    def taken_from(self, whole: Tensor) -> Tensor:
        """The same of another parameter of that shape, ``[...]`` as `read` gives them."""

    def zero(self) -> None:
        """Set them to zero."""

    def write(self, values: Tensor) -> None:
        """Set them to ``values``, ``[...]`` as `read` gives them."""


@dataclass(frozen=True, eq=False)
class Columns:
    """Some columns of one module's B."""

    module: DepthTwoModule
    index: Tensor  # int64 [n], along `dim` of the weight

    @property
    def param(self) -> str:
        """The name of B's weight in the model."""
        return self.module.output.param

    @property
    def owner(self) -> nn.Module:
        """The module that holds the weight."""
        return self.module.down

    @property
    def weight(self) -> Tensor:
        """B's weight as it is now: ``[out, units]`` in a Linear, ``[units, out]`` in a Conv1D."""
        return self.module.weight

    @property
    def dim(self) -> int:
        """Of the weight, running over units: 1 in a Linear, 0 in a Conv1D."""
        return self.module.output.dim

    def read(self) -> Tensor:
        """A copy of the columns: ``[out, n]`` in a Linear, ``[n, out]`` in a Conv1D."""
        return self.weight.index_select(self.dim, self.index)

    def taken_from(self, whole: Tensor) -> Tensor:
        """The same columns of another weight, ``[out, n]``; of experts it has all, ``[e, ...]``."""
        own = whole if self.module.expert is None else whole[self.module.expert]
        return own.index_select(self.dim, self.index.to(whole.device))

    def zero(self) -> None:
        """Set them to zero."""
        self.weight.index_fill_(self.dim, self.index, 0)

    def write(self, values: Tensor) -> None:
        """Set them to ``values``, ``[out, n]`` or ``[n, out]`` as `read` gives them.

        The weight is taken as it is now: it may have been moved or converted since it was read.
        """
        weight = self.weight
        values = values.to(weight.device, weight.dtype)
        weight.index_copy_(self.dim, self.index.to(weight.device), values)


@dataclass(frozen=True, eq=False)
class MaskedEntries:
    """Some entries of a parameter, whichever they are.

    Attributes:
        param: the name of the parameter.
        owner: the module that holds it.
        bits: a mask that broadcasts over it. It is unpacked where it is used: the masks of all
            weights of a model, with a byte for each, would be half a model in 16 bits.
    """

    param: str
    owner: nn.Module
    bits: BitMask

    @property
    def weight(self) -> Tensor:
        """The parameter as it is now, ``[...]``: it may have been moved or converted."""
        weight: Tensor = getattr(self.owner, self.param.rpartition(".")[2])
        return weight

    def read(self) -> Tensor:
        """A copy of the entries, ``[n]`` in row-major order."""
        return self.taken_from(self.weight)

    def taken_from(self, whole: Tensor) -> Tensor:
        """The same of another such parameter ``[...]``: ``[n]``."""
        return whole.masked_select(self.bits.to_mask().to(whole.device))

    def zero(self) -> None:
        """Set them to zero."""
        weight = self.weight
        weight.masked_fill_(self.bits.to_mask().to(weight.device), 0)

    def write(self, values: Tensor) -> None:
        """Set them to ``values``, ``[n]`` as `read` gives them."""
        weight = self.weight
        values = values.to(weight.device, weight.dtype)
        weight.masked_scatter_(self.bits.to_mask().to(weight.device), values)


def checked_modules(model: nn.Module, units: UnitSet) -> dict[str, DepthTwoModule]:
    """The depth-2 modules of ``model`` that ``units`` is over.

    Raises:
        TypeError: ``units`` is no `UnitSet`.
        ValueError: ``units`` is of another model.
    """
    return check_units(model, units)


def columns_of(units: UnitSet, modules: Mapping[str, DepthTwoModule]) -> dict[str, Columns]:
    """The columns of B that units own, by module.

    Raises:
        ValueError: a weight cannot be written: it is packed, or not in memory.
    """
    columns = {}
    for name, module in modules.items():
        if len(units[name]) == 0:
            continue
        weight = module.weight
        if weight.is_meta or not weight.is_floating_point():
            raise ValueError(
                f"{module.output.param} is {weight.dtype} on {weight.device}; it must be a "
                "floating-point weight in memory (dequantize the model, and load it whole)"
            )
        index = module.output.index[units[name]].to(weight.device)  # [n]
        columns[name] = Columns(module, index)
    return columns


def check_finite(read: Iterable[tuple[Part, Tensor]]) -> None:
    """Refuse weights that are no numbers: without them the model would only look whole.

    Args:
        read: parts with their values, ``[out, n]`` or ``[n, out]`` of columns.

    Raises:
        FloatingPointError: the weight is named.
    """
    name = nonfinite((part.param, values) for part, values in read)
    if name is not None:
        raise FloatingPointError(
            f"{name} is NaN or infinite in columns or weights that are to be changed: the "
            "checkpoint is damaged, or was written by a run that diverged; load another one"
        )
