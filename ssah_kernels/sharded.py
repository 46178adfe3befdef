"""Parameters that are DTensors: this rank's rows of them, and what of these trains.

The layout is that of ``torch.distributed.fsdp.fully_shard``: sharded along dimension 0 over a mesh
of one dimension, the first ranks holding ceil(rows / ranks) rows each: of 10 rows, 4 ranks hold 3,
3, 3 and 1.

Entries run along one dimension. Where the first dimension runs over the experts of a layer, ``dim``
is a pair (0, d): entries along d of the first expert, then those of the second, and so on. Of a
parameter [2 experts, 5 units, 8], entry 6 along (0, 1) is unit 1 of expert 1. Two ranks hold an
expert each, and the second of them sees that entry as its own number 1. Along (0, 1) the entries of
all experts are the rows of one matrix [2 * 5, 8]; along (0, 2) each expert is a matrix of its own.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

import torch
from torch import Tensor

from .indices import State, state_of

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Dim: TypeAlias = int | tuple[int, int]


def may_be_sharded() -> bool:
    """Whether there can be a DTensor: without a process group there is none."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_sharded(tensor: Any) -> TypeGuard[DTensor]:
    """Whether ``tensor`` [...] is a DTensor."""
    if not may_be_sharded():  # the import below is slow
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def check_layout(name: str, tensor: DTensor) -> None:
    """Raise ValueError unless ``tensor`` [...] is sharded as ``fully_shard`` does by default."""
    from torch.distributed.tensor import Shard

    if tensor.placements != (Shard(0),):
        raise ValueError(
            f"{name} is placed as {tensor.placements} on a mesh of {tensor.device_mesh.ndim} "
            "dimensions; it must be sharded along dimension 0 on a mesh of one, as fully_shard does"
        )


def local(tensor: Tensor) -> Tensor:
    """This rank's rows [rows, ...] of a DTensor, not a copy; of any other tensor, all of it."""
    return tensor.to_local().detach() if is_sharded(tensor) else tensor


def first_row(tensor: Tensor) -> int:
    """Number of the first row of ``tensor`` [rows, ...] that this rank holds; 0 if it has all."""
    if not is_sharded(tensor):
        return 0
    mesh, rows = tensor.device_mesh, tensor.shape[0]
    return min(rows, mesh.get_local_rank() * -(-rows // mesh.size()))


def local_index(tensor: Tensor, index: Tensor, dim: Dim) -> Tensor:
    """Those of the entries ``index`` [trained] along ``dim`` that this rank holds, counted in its
    part: of ``index`` [2, 3, 7], a rank that holds rows 3 to 5 has [0]."""
    first, *rest = dim if isinstance(dim, tuple) else (dim,)
    if first % tensor.dim() != 0 or not is_sharded(tensor):
        return index  # along a dimension that is not cut: every rank holds all of it
    in_row = tensor.shape[rest[0]] if rest else 1
    index = index - first_row(tensor) * in_row  # [trained], counted from this rank's first row
    return index[(index >= 0) & (index < len(local(tensor)) * in_row)]


@dataclass(frozen=True, eq=False)
class Part:
    """Entries of some rows that lie along one dimension: of all rows, or of one expert's.

    Of experts whose units are rows, the rows of all of them are one matrix.

    Attributes:
        index: int64 [trained], the entries; None: all.
        dim: that ``index`` runs along.
        expert: which of the rows; None: all of them.
        joined: whether ``index`` runs over the first two dimensions together.
    """

    index: Tensor | None
    dim: int
    expert: int | None = None
    joined: bool = False

    def rows(self, rows: Tensor) -> Tensor:
        """All of ``rows`` [rows, ...], those of the expert, or the first two dimensions as one; a
        copy of a gradient at most, whose experts lie apart."""
        if self.joined:
            return rows.flatten(0, 1)
        return rows if self.expert is None else rows[self.expert]

    def shape(self, rows: Tensor) -> torch.Size:
        """The shape of :meth:`entries`, of which no copy is made."""
        shape = list(self.rows(rows).shape)
        if self.index is not None:
            shape[self.dim] = len(self.index)
        return torch.Size(shape)

    def entries(self, rows: Tensor) -> Tensor:
        """A copy of the entries of ``rows`` [rows, ...]; where they are all, not a copy."""
        own = self.rows(rows)
        return own if self.index is None else own.index_select(self.dim, self.index)


def parts(tensor: Tensor, index: Tensor | None, dim: Dim) -> list[Part]:
    """What of ``index`` [trained], entries over the whole parameter, this rank holds; parts may be
    empty."""
    along = dim[-1] if isinstance(dim, tuple) else dim
    if index is None:
        return [Part(None, along)]
    own, n_rows = local_index(tensor, index, dim), len(local(tensor))
    if along == dim or n_rows == 0:
        return [Part(own, along)]
    if along == 1 and _can_be_joined(local(tensor)):
        return [Part(own, 0, joined=True)]
    # Experts: entry e of this rank is unit e % size of its expert e // size.
    size = tensor.shape[along]
    # Sorted by expert already: a piece [units] for each, which may be empty.
    each = (own % size).split(torch.bincount(own // size, minlength=n_rows).tolist())
    return [Part(entries, along - 1, expert) for expert, entries in enumerate(each)]


def _can_be_joined(rows: Tensor) -> bool:
    """Whether the first two dimensions of ``rows`` [experts, units, ...] are one without a copy."""
    return rows.shape[0] == 1 or rows.stride(0) == rows.shape[1] * rows.stride(1)


class Cut:
    """What of one parameter this rank updates, where it does not have all of it, or has experts.

    Attributes:
        parts: entries of this rank's rows; some may be empty.
        shapes: of each of these, [trained, other].
        whole: of state of all of them: pieces lie flat, one behind the other.
        here: whether this rank has anything that trains.
    """

    def __init__(self, tensor: Tensor, index: Tensor | None, dim: Dim) -> None:
        rows = local(tensor)
        self._of = index, _state(index), rows.shape, rows.stride()
        self.parts = parts(tensor, index, dim)
        self.shapes = [part.shape(rows) for part in self.parts]
        several = index is not None and isinstance(dim, tuple) and tensor.shape[0] != 1
        flat = torch.Size([sum(map(math.prod, self.shapes))])
        self.whole = flat if several else self.shapes[0]
        self.here = not is_sharded(tensor) or any(map(math.prod, self.shapes))
        self._held: tuple[list[Tensor], list[dict[str, Tensor]]] = [], []

    def is_of(self, tensor: Tensor, index: Tensor | None) -> bool:
        """Whether ``tensor`` [rows, ...] and ``index`` [trained] are what this was made of."""
        rows = local(tensor)
        return self._of[0] is index and self._of[1:] == (_state(index), rows.shape, rows.stride())

    def rows(self, rows: Tensor) -> list[Tensor]:
        """Those of every part of ``rows`` [rows, ...], views [units, other]."""
        if len(self.parts) == 1:
            return [self.parts[0].rows(rows)]
        return list(rows.unbind())  # an expert each

    def state(self, state: Mapping[str, Any]) -> list[dict[str, Tensor]]:
        """The state of every part, [trained, other] each: views, made once for the same tensors."""
        held = {name: value for name, value in state.items() if name != "step"}
        if len(self.parts) == 1 and self.whole == self.shapes[0]:
            return [held]
        known, pieces = self._held
        if len(known) != len(held) or any(map(operator.is_not, known, held.values())):
            each = [cut(value, self.shapes) for value in held.values()]
            pieces = [dict(zip(held, own, strict=True)) for own in zip(*each, strict=True)]
            self._held = list(held.values()), pieces
        return pieces or [{} for _ in self.parts]


def _state(index: Tensor | None) -> State | None:
    return None if index is None else state_of(index)


def cut(values: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Contiguous ``values`` [all] as views of ``shapes``, one behind the other."""
    # [all] -> one flat piece for each, then its shape: [units, other].
    pieces = values.view(-1).split([math.prod(shape) for shape in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def join(pieces: Sequence[Tensor]) -> Tensor:
    """What :func:`cut` cuts: one piece as it is, several flat, [all]."""
    return pieces[0] if len(pieces) == 1 else torch.cat([piece.flatten() for piece in pieces])


def expand(
    tensor: DTensor,
    own: Tensor,
    index: Tensor | None,
    dim: Dim,
    shape: Sequence[int] | None = None,
) -> DTensor:
    """A DTensor like ``tensor`` with ``own`` at the entries that train on this rank, else 0.

    Args:
        tensor: the parameter.
        own: compact state of this rank: [trained here, other], or flat where there are experts.
        index: int64 [trained], over the whole parameter; None: all, then no copy is made.
        dim: that ``index`` runs along.
        shape: of the result, [rows, ...] with the rows of ``tensor``; None: that of ``tensor``.
    """
    from torch.distributed.tensor import DTensor

    rows = own
    if index is not None:
        # [rows of this rank, ...]
        rows = own.new_zeros((len(local(tensor)), *(shape or tensor.shape)[1:]))
        pieces = parts(tensor, index, dim)
        values = cut(own, [part.shape(rows) for part in pieces])
        for part, value in zip(pieces, values, strict=True):
            assert part.index is not None
            part.rows(rows).index_copy_(part.dim, part.index, value)
    return DTensor.from_local(
        rows,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,  # a check would make every rank wait for all others
        shape=torch.Size(shape or tensor.shape),
        stride=torch.empty(shape, device="meta").stride() if shape else tensor.stride(),
    )


def compact(
    tensor: DTensor,
    dense: Tensor,
    index: Tensor | None,
    dim: Dim,
    shape: Sequence[int] | None = None,
) -> Tensor:
    """What :func:`expand` was made of: [trained here, other], or flat where there are experts.

    Raises:
        ValueError: ``dense`` is no DTensor of this shape and of the placement of ``tensor``.
    """
    must = torch.Size(shape or tensor.shape)
    if (
        not is_sharded(dense)
        or dense.shape != must
        or dense.placements != tensor.placements
        or dense.device_mesh != tensor.device_mesh
    ):
        raise ValueError(
            f"state of a sharded parameter {list(must)} is a {type(dense).__name__} "
            f"{list(dense.shape)}; it must be a DTensor sharded alike: load it with "
            "torch.distributed.checkpoint, which shards it for any number of ranks"
        )
    rows = local(dense)
    return join([part.entries(rows) for part in parts(tensor, index, dim)])
