"""Parameters that are DTensors: this rank's rows of them, and what of these trains.

The layout is that of ``torch.distributed.fsdp.fully_shard``: sharded along dimension 0 over a mesh
of one dimension, the first ranks holding ceil(rows / ranks) rows each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["check_layout", "compact", "expand", "first_row", "is_sharded", "local", "local_index"]


def is_sharded(tensor: Any) -> TypeGuard[DTensor]:
    """Whether ``tensor`` is a DTensor."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def check_layout(name: str, tensor: DTensor) -> None:
    """Raise ValueError unless ``tensor`` is sharded as ``fully_shard`` does by default."""
    from torch.distributed.tensor import Shard

    if tensor.placements != (Shard(0),):
        raise ValueError(
            f"{name} is placed as {tensor.placements} on a mesh of {tensor.device_mesh.ndim} "
            "dimensions; it must be sharded along dimension 0 on a mesh of one, as fully_shard does"
        )


def local(tensor: Tensor) -> Tensor:
    """This rank's rows of a DTensor, not a copy; of any other tensor, all of it."""
    return tensor.to_local().detach() if is_sharded(tensor) else tensor


def first_row(tensor: DTensor) -> int:
    """Number of the first row that this rank holds."""
    mesh, rows = tensor.device_mesh, tensor.shape[0]
    return min(rows, mesh.get_local_rank() * -(-rows // mesh.size()))


def local_index(tensor: DTensor, index: Tensor, dim: int) -> Tensor:
    """Those of the entries ``index`` along ``dim`` that this rank holds, counted in its part."""
    if dim % tensor.dim() != 0:
        return index
    index = index - first_row(tensor)
    return index[(index >= 0) & (index < len(local(tensor)))]


def expand(tensor: DTensor, own: Tensor, index: Tensor | None, dim: int) -> DTensor:
    """A DTensor like ``tensor`` with ``own`` at the entries that train on this rank, else 0.

    Args:
        tensor: the parameter.
        own: compact state of this rank.
        index: of the entries that train, over the whole parameter; None: all, then no copy is made.
        dim: that ``index`` runs along.
    """
    from torch.distributed.tensor import DTensor

    rows = own
    if index is not None:
        rows = own.new_zeros(local(tensor).shape)
        rows.index_copy_(dim, local_index(tensor, index, dim), own)
    return DTensor.from_local(
        rows,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def compact(tensor: DTensor, dense: Tensor, index: Tensor | None, dim: int) -> Tensor:
    """What :func:`expand` was made of.

    Raises:
        ValueError: ``dense`` is no DTensor of the shape and placement of ``tensor``.
    """
    if (
        not is_sharded(dense)
        or dense.shape != tensor.shape
        or dense.placements != tensor.placements
        or dense.device_mesh != tensor.device_mesh
    ):
        raise ValueError(
            f"state of a sharded parameter {list(tensor.shape)} is a {type(dense).__name__} "
            f"{list(dense.shape)}; it must be a DTensor sharded alike: load it with "
            "torch.distributed.checkpoint, which shards it for any number of ranks"
        )
    rows = local(dense)
    return rows if index is None else rows.index_select(dim, local_index(tensor, index, dim))
