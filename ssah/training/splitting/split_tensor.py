"""How a tensor of which only some entries train is stored.

The tensor (weight or bias of a projection) is kept *unit-major*: entries run along dimension 0, so
that what trains is whole rows of storage. A weight ``[out, in]`` of A has its entries as rows
already; that of B has them as columns, and is stored transposed:

    A (gate, up, V)   storage [entries, in]  = weight        y = x @ storage.T
    B (down, O)       storage [entries, out] = weight.T      y = x @ storage

Two layouts. Example: 4 entries, of which 1 and 3 train.

* *packed* (weights): the rows are permuted once so that those that train lie side by side. The
  trained slice is a parameter that aliases storage: nothing is copied, ever. What becomes of the
  channels in this order is said in `ssah.training.splitting.masked_linear`.

      storage row   0  1  2  3        order = [1, 3, 0, 2], places = [2, 0, 3, 1]
      entry         1  3  0  2        parts = ((0, 2),), one parameter: storage[0:2]
      trains        x  x

* *gathered* (biases, rows of embeddings, whose number is a token's): the order stays. The trained
  rows are one compact parameter of their own, which is written into storage before every use.

      storage row   0  1  2  3        order = None
      trains           x     x        parts = (tensor([1, 3]),), one parameter [2, ...]

Of routed experts, whose parameter has three dimensions, entries run over the first expert's, then
the second's (`unit_major`), and are packed over all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssah.training.splitting.packed_parameter import PackedParameter
from ssah.training.splitting.storage_order import runs, unit_major

# A stretch (start, stop) of storage rows, or the rows that were gathered, int64 or int32.
Part = tuple[int, int] | Tensor


def _nothing() -> None:
    """No copy was put into a state dict yet."""


@dataclass(eq=False)
class SplitTensor:
    """One tensor of a projection while only part of it trains.

    The trained parameters are not held here but by the projection, where torch looks for them.

    Attributes:
        original: the parameter that this replaces; it holds no data meanwhile.
        shape: of the original.
        dims: its dimensions that run over entries, see :func:`unit_major`.
        storage: unit-major ``[entries, ...]``, what the forward pass uses.
        order: int64 ``[entries]``, the original entry that each storage row holds; None where
            the order is the original one.
        places: int64 ``[entries]``, the storage row of each original entry; None like ``order``.
        parts: the storage rows that train, one element per parameter in ``names``.
        names: the trained parameters' names in their projection.
        swapped: whether somebody gave a packed slice other memory, see :meth:`part`.
        last_copy: of tied rows: what was put into a state dict last, while that is alive.
    """

    original: nn.Parameter
    shape: torch.Size
    dims: tuple[int, ...]
    storage: Tensor
    order: Tensor | None
    places: Tensor | None
    parts: tuple[Part, ...]
    names: tuple[str, ...]
    swapped: bool = False
    last_copy: Callable[[], Tensor | None] = _nothing

    @classmethod
    def of(
        cls,
        name: str,
        original: nn.Parameter,
        dims: tuple[int, ...],
        order: Tensor | None,
        trains: Tensor,
        *,
        stretches: int = 0,
    ) -> SplitTensor:
        """Take over ``original``, of which the entries ``trains`` (bool) along ``dims`` train.

        Args:
            name: of the tensor in its module, e.g. ``"weight"`` or ``"bias"``.
            original: emptied; :meth:`restore` fills it again.
            order: int64 ``[entries]``, pack the entries in this order; or None to gather.
            trains: bool ``[entries]``.
            stretches: gathered, up to so many stretches of rows are views all the same.
        """
        device, shape = original.device, original.shape
        values = unit_major(original.detach(), dims)  # [entries, ...]
        if order is None:
            storage = values.clone(memory_format=torch.contiguous_format)
            index = trains.nonzero()[:, 0]
            # Of single weights there are millions: no stretches, and places of 32 bits.
            pieces = runs(index) if stretches else []
            short = index.int() if len(dims) == len(shape) and len(trains) < 1 << 31 else index
            # A tensor may stay whole beside others of its module that train in part.
            several = (short.to(device),) if len(index) else ()
            views = 0 < len(pieces) <= stretches
            parts: tuple[Part, ...] = tuple(pieces) if views else several
        else:
            storage = values.index_select(0, order.to(device))
            parts = tuple(runs(trains[order].nonzero()[:, 0]))
            order = order.to(device)
        # Several where gate and up are one weight: each has its own stretch of trained rows.
        suffixes = ("",) if len(parts) == 1 else tuple(f"_{i}" for i in range(len(parts)))
        names = tuple(f"{name}_trained{suffix}" for suffix in suffixes)
        places = None if order is None else order.argsort()
        split = cls(original, shape, dims, storage.contiguous(), order, places, parts, names)
        original.grad = None
        original.data = original.data.new_empty(0)  # last: nothing can fail after it
        return split

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """New parameters ``[trained, ...]``, as in storage: views where packed, else a copy."""
        for name, part in zip(self.names, self.parts, strict=True):
            parameter: nn.Parameter
            if isinstance(part, Tensor):
                parameter = nn.Parameter(_rows(self.storage, part))
            else:
                parameter = PackedParameter(_rows(self.storage, part))
                parameter.on_swap = self.part
            yield name, parameter

    def trained_pieces(self) -> list[Tensor]:
        """The original entries of each trained parameter, int64 ``[its rows]`` on the CPU."""
        rows = [torch.arange(*p) if isinstance(p, tuple) else p.cpu().long() for p in self.parts]
        return rows if self.order is None else [self.order.cpu()[each] for each in rows]

    def trained_index(self) -> Tensor:
        """The original entries that train, int64 ``[trained]`` on the CPU, piece by piece."""
        return torch.cat([*self.trained_pieces(), torch.empty(0, dtype=torch.int64)])

    def frozen_rows(self) -> Iterator[Tensor]:
        """The frozen entries in ascending original order, as pieces ``[rows, ...]`` of storage."""
        frozen = torch.ones(len(self.storage), dtype=torch.bool)
        frozen[self.trained_index()] = False
        entries = frozen.nonzero()[:, 0]
        if self.places is None:
            yield self.storage.index_select(0, entries.to(self.storage.device))
            return
        # Stretches are views, nothing is copied.
        for start, stop in runs(self.places.cpu()[entries]):
            yield self.storage[start:stop]

    def read(self) -> Tensor:
        """A copy in the original order and orientation, such as ``[out, in]``."""
        rows = self.storage
        rows = rows.clone() if self.places is None else rows.index_select(0, self.places)
        return self.present(rows).contiguous()

    def present(self, rows: Tensor) -> Tensor:
        """``rows`` ``[entries, ...]``, in the original order, as the original lies: a view."""
        # The inverse of `unit_major`: [entries, ...] to [experts, entries of one, ...] and back.
        inside = rows.unflatten(0, [self.shape[dim] for dim in self.dims])
        return inside.movedim(tuple(range(len(self.dims))), self.dims)

    @torch.no_grad()
    def write(self, values: Tensor, owner: nn.Module) -> None:
        """Take over values as `read` gives them, ``[out, in]``, into ``owner``'s slices too."""
        rows = unit_major(values.to(self.storage.device), self.dims)  # [entries, ...]
        self.storage.copy_(rows if self.order is None else rows[self.order])
        for parameter, part in self._apart(owner):
            parameter.copy_(_rows(self.storage, part))

    def sync(self, owner: nn.Module) -> None:
        """Bring ``owner``'s trained parameters that do not alias the storage into it."""
        # Through .data: the version of the storage must not change when another forward pass
        # writes the same values again. The parameter, saved beside it, has a version too.
        for parameter, part in self._apart(owner):
            if isinstance(part, Tensor):
                values = parameter.data.to(self.storage.dtype)
                self.storage.data.index_copy_(0, part.long(), values)
            else:
                self.storage.data[part[0] : part[1]].copy_(parameter.data)

    def part(self) -> None:
        """A packed slice got other memory: from now on its values are copied before each use."""
        # Into a copy. Whoever swapped may hold the old memory as a backup, which must stay.
        if not self.swapped:
            self.storage = self.storage.clone()
            self.swapped = True

    def assembled(self, owner: nn.Module) -> Tensor:
        """The storage ``[entries, ...]`` with ``owner``'s present slices, as autograd follows it;
        nothing is written: they may be another's, which ``functional_call`` lends."""
        result = self.storage
        for name, part in zip(self.names, self.parts, strict=True):
            values = owner._parameters[name]  # [trained, ...]
            assert values is not None
            if isinstance(part, Tensor):
                result = result.index_copy(0, part.long(), values)
            else:
                result = result.slice_scatter(values, 0, *part)
        return result

    def _apart(self, owner: nn.Module) -> Iterator[tuple[nn.Parameter, Part]]:
        """The trained parameters that have memory of their own, with their part of storage.

        A gathered one always has. A packed one has it once somebody gave it other memory.
        """
        for name, part in zip(self.names, self.parts, strict=True):
            if isinstance(part, Tensor) or self.swapped:
                parameter = owner._parameters[name]
                assert parameter is not None
                yield parameter, part

    def convert(self, function: Callable[[Tensor], Tensor], owner: nn.Module) -> None:
        """Move or cast the storage ``[entries, ...]`` as :meth:`torch.nn.Module._apply` does, and
        alias it again."""
        self.storage = function(self.storage)
        device = self.storage.device
        self.order = None if self.order is None else self.order.to(device)
        self.places = None if self.places is None else self.places.to(device)
        self.parts = tuple(p.to(device) if isinstance(p, Tensor) else p for p in self.parts)
        self.alias(owner)

    def alias(self, owner: nn.Module) -> None:
        """Make the trained parameters of a packed layout views of the storage."""
        for name, part in zip(self.names, self.parts, strict=True):
            parameter = owner._parameters[name]
            assert parameter is not None
            if isinstance(part, tuple):
                if isinstance(parameter, PackedParameter):
                    parameter.on_swap = None  # this is no swap
                parameter.data = _rows(self.storage, part)
                if isinstance(parameter, PackedParameter):
                    parameter.on_swap = self.part
        self.swapped = False

    def restore(self) -> nn.Parameter:
        """The original parameter, such as ``[out, in]``, with the present values."""
        self.original.data = self.read()
        return self.original


@contextmanager
def restored(tensors: Mapping[str, SplitTensor]) -> Iterator[None]:
    """The originals of ``tensors`` hold their values again if the block raises."""
    try:
        yield
    except BaseException:
        for split in tensors.values():
            split.restore()
        raise


def width(part: Part) -> int:
    """Number of storage rows of a part."""
    return len(part) if isinstance(part, Tensor) else part[1] - part[0]


def _rows(storage: Tensor, part: Part) -> Tensor:
    """The rows of a part, ``[trained, ...]``: a view of a stretch, or gathered."""
    if isinstance(part, Tensor):
        return storage.index_select(0, part)
    return storage[part[0] : part[1]]
