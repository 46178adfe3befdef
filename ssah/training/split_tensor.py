"""How a tensor of which only some entries train is stored.

The tensor (weight or bias of a projection) is kept *unit-major*: units run along dimension 0, so
that what trains is whole rows of storage. Two layouts:

* packed: the rows are permuted once so that those that train lie side by side. The trained slices
  are parameters that alias the storage which the forward pass multiplies with.
* gathered: the order stays; the trained rows are one compact parameter of their own, which is
  written into the storage before every use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Part", "Slot", "restored", "runs", "unit_major", "width"]

# A stretch (start, stop) of storage rows, or the int64 rows that were gathered.
Part = tuple[int, int] | Tensor


def runs(positions: Tensor) -> list[tuple[int, int]]:
    """The stretches (start, stop) of consecutive integers in ``positions``, in their order."""
    found: list[tuple[int, int]] = []
    if len(positions) == 0:
        return found
    breaks = (positions.diff() != 1).nonzero()[:, 0] + 1
    for piece in positions.tensor_split(breaks.cpu()):
        found.append((int(piece[0]), int(piece[-1]) + 1))
    return found


@dataclass(eq=False)
class Slot:
    """One tensor of a projection while only part of it trains.

    Attributes:
        original: the parameter that this replaces; it holds no data meanwhile.
        shape: of the original.
        dims: its dimensions that run over entries, see :func:`unit_major`.
        storage: unit-major ``[entries, ...]``, what the forward pass uses.
        order: int64 ``[entries]``, the original entry that each storage row holds; None where
            the order is the original one.
        parts: the storage rows that train, one element per parameter in ``names``.
        names: the trained parameters' names in their module.
    """

    original: nn.Parameter
    shape: torch.Size
    dims: tuple[int, ...]
    storage: Tensor
    order: Tensor | None
    parts: tuple[Part, ...]
    names: tuple[str, ...]

    @classmethod
    def of(
        cls,
        name: str,
        original: nn.Parameter,
        dims: tuple[int, ...],
        order: Tensor | None,
        trains: Tensor,
    ) -> Slot:
        """Take over ``original``, of which the entries ``trains`` (bool) along ``dims`` train.

        Args:
            name: of the tensor in its module, e.g. ``"weight"`` or ``"bias"``.
            original: emptied; :meth:`restore` fills it again.
            dims: dimensions that run over entries.
            order: pack the entries in this order, or None to gather.
            trains: bool ``[entries]``.
        """
        device, shape = original.device, original.shape
        values = unit_major(original.detach(), dims)
        parts: tuple[Part, ...]
        if order is None:
            storage = values.clone(memory_format=torch.contiguous_format)
            parts = (trains.nonzero()[:, 0].to(device),)
        else:
            storage = values.index_select(0, order.to(device))
            parts = tuple(runs(trains[order].nonzero()[:, 0]))
            order = order.to(device)
        suffixes = ("",) if len(parts) == 1 else tuple(f"_{i}" for i in range(len(parts)))
        names = tuple(f"{name}_trained{suffix}" for suffix in suffixes)
        slot = cls(original, shape, dims, storage.contiguous(), order, parts, names)
        original.grad = None
        original.data = original.data.new_empty(0)  # last: nothing can fail after it
        return slot

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """New parameters over the trained rows: views where packed, a copy where gathered."""
        for name, part in zip(self.names, self.parts, strict=True):
            rows = _rows(self.storage, part)
            yield name, nn.Parameter(rows)

    def trained_index(self) -> Tensor:
        """int64 on the CPU: the original entries that train, parameter by parameter."""
        rows = [torch.arange(*p) if isinstance(p, tuple) else p.cpu() for p in self.parts]
        index = torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64)
        return index if self.order is None else self.order.cpu()[index]

    def frozen_rows(self) -> Iterator[Tensor]:
        """The frozen entries in ascending original order, as pieces of unit-major rows."""
        frozen = torch.ones(len(self.storage), dtype=torch.bool)
        frozen[self.trained_index()] = False
        entries = frozen.nonzero()[:, 0]
        if self.order is None:
            yield self.storage.index_select(0, entries.to(self.storage.device))
            return
        for start, stop in runs(torch.argsort(self.order.cpu())[entries]):
            yield self.storage[start:stop]

    def read(self) -> Tensor:
        """A copy in the original order and orientation."""
        rows = self.storage
        rows = rows.clone() if self.order is None else rows.index_select(0, self.order.argsort())
        inside = rows.unflatten(0, [self.shape[dim] for dim in self.dims])
        return inside.movedim(tuple(range(len(self.dims))), self.dims).contiguous()

    @torch.no_grad()
    def write(self, values: Tensor, owner: nn.Module) -> None:
        """Take over values in the original order and orientation."""
        rows = unit_major(values, self.dims)
        self.storage.copy_(rows if self.order is None else rows[self.order])
        for name, part in zip(self.names, self.parts, strict=True):
            parameter = owner._parameters[name]
            if not self._aliases(parameter, part):
                parameter.copy_(_rows(self.storage, part))  # type: ignore[union-attr]

    def _aliases(self, parameter: Any, part: Part) -> bool:
        if isinstance(part, Tensor):
            return False
        return parameter.data_ptr() == self.storage[part[0]].data_ptr()

    def sync(self, owner: nn.Module) -> None:
        """Bring trained parameters that do not alias the storage into it."""
        compiling = torch.compiler.is_compiling()
        for name, part in zip(self.names, self.parts, strict=True):
            parameter = owner._parameters[name]
            assert parameter is not None
            # Through .data: the version of the storage must not change when another forward pass
            # writes the same values again. The parameter, saved beside it, has a version too.
            if isinstance(part, Tensor):
                self.storage.data.index_copy_(0, part, parameter.data.to(self.storage.dtype))
            elif not compiling and not self._aliases(parameter, part):
                self.storage.data[part[0] : part[1]].copy_(parameter.data)

    def convert(self, function: Callable[[Tensor], Tensor], owner: nn.Module) -> None:
        """Move or cast the storage as :meth:`torch.nn.Module._apply` does, and alias it again."""
        self.storage = function(self.storage)
        device = self.storage.device
        self.order = None if self.order is None else self.order.to(device)
        self.parts = tuple(p.to(device) if isinstance(p, Tensor) else p for p in self.parts)
        self.alias(owner._parameters)

    def alias(self, parameters: dict[str, nn.Parameter | None]) -> None:
        """Make the trained parameters of a packed layout views of the storage."""
        for name, part in zip(self.names, self.parts, strict=True):
            parameter = parameters[name]
            assert parameter is not None
            if isinstance(part, tuple):
                parameter.data = self.storage[part[0] : part[1]]

    def restore(self) -> nn.Parameter:
        """The original parameter with the present values."""
        self.original.data = self.read()
        return self.original


@contextmanager
def restored(slots: Mapping[str, Slot]) -> Iterator[None]:
    """The originals of ``slots`` hold their values again if the block raises."""
    try:
        yield
    except BaseException:
        for slot in slots.values():
            slot.restore()
        raise


def unit_major(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    """``values`` with its entries along dimension 0: those of the dimensions ``dims``, in order.

    One dimension gives a view; of a 3-D parameter of experts, (0, d) gives the entries along d of
    the first expert, then of the second, a copy where memory is in another order.
    """
    return values.movedim(dims, tuple(range(len(dims)))).flatten(0, len(dims) - 1)


def _rows(storage: Tensor, part: Part) -> Tensor:
    if isinstance(part, Tensor):
        return storage.index_select(0, part)
    return storage[part[0] : part[1]]


def width(part: Part) -> int:
    """Number of storage rows of a part."""
    return len(part) if isinstance(part, Tensor) else part[1] - part[0]


def complement_rows(weight: Tensor, dims: tuple[int, ...], index: Tensor) -> Tensor:
    """What of ``weight`` is not in ``index`` along ``dims``: unit-major, in ascending order."""
    rows = unit_major(weight.detach(), dims)
    keep = torch.ones(len(rows), dtype=torch.bool)
    keep[index] = False
    return rows.index_select(0, keep.nonzero()[:, 0].to(weight.device))
