"""A plan on a model that ``torch.distributed.fsdp.fully_shard`` has sharded, or soon will.

Nothing is split: every parameter stays what it is, its gradient is dense, and the optimiser updates
the entries that train. Every rank answers for its own rows; of a parameter that is not sharded yet
it has all of them. Example: of a down projection ``[4, 6]`` the columns 1 and 3 train. The first of
two ranks holds ``[2, 6]``, of which columns 0, 2, 4 and 5 are frozen: unit-major ``[4, 2]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ssah.distributed import Ranks
from ssah.models import digests
from ssah.training.entries import Entries, TrainedSlice
from ssah.training.splitting import complement_rows, unit_major
from ssah_kernels.sharded import check_layout, is_sharded, local, local_index


def check_sharded(name: str, parameter: Tensor) -> None:
    """Refuse, with ValueError, a parameter ``[...]`` that is not sharded as a plan needs it."""
    if not is_sharded(parameter):
        raise ValueError(
            f"parameter {name!r} is not sharded, must be like the others: apply "
            "fully_shard to the whole model"
        )
    check_layout(f"parameter {name!r}", parameter)


def frozen_pieces(
    model: nn.Module, entries: Mapping[str, Entries]
) -> dict[str, Callable[[], Iterable[Tensor]]]:
    """This rank's frozen entries: parameter -> unit-major rows ``[frozen, other]``."""

    def piece(name: str, each: Entries) -> Iterable[Tensor]:
        parameter = model.get_parameter(name)
        index = local_index(parameter, each.index, each.along)
        yield complement_rows(local(parameter), each.dims, index)

    return {name: partial(piece, name, each) for name, each in entries.items() if not each.whole}


def whole_digests(
    model: nn.Module,
    entries: Mapping[str, Entries],
    ranks: Ranks,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> dict[str, str]:
    """Hashes of what is frozen of the whole model, as a plan in one memory has them.

    One parameter is put together at a time, on every rank; each of them has to call this.

    Args:
        dtypes: parameter -> the dtype that it is hashed in; None: its own.

    Returns:
        parameter -> hash on the first rank, nothing on the others.
    """
    result: dict[str, str] = {}
    for name, each in entries.items():
        if not each.whole:
            whole = gathered(model.get_parameter(name))
            if ranks.rank != 0:
                continue
            whole = whole if dtypes is None else whole.to(dtypes[name])
            # A parameter of which nothing trains keeps its own orientation, as an update has it.
            rows = complement_rows(whole, each.dims, each.index) if each.some else whole
            result |= digests({name: partial(tuple, [rows])})
    return result


def gathered(parameter: Tensor) -> Tensor:
    """All of a parameter ``[...]``, of which each rank may hold some rows; every rank calls it."""
    whole = parameter.full_tensor() if is_sharded(parameter) else parameter
    return whole.detach()


def trained_values(each: TrainedSlice) -> Tensor:
    """What trains of a parameter: ``[trained, ...]``, unit-major, or all of it, ``[...]``."""
    whole = gathered(each.parameter)
    if each.split or each.entries.whole:
        return whole
    return unit_major(whole, each.entries.dims).index_select(0, each.index.to(whole.device))


def clear_frozen_gradients(model: nn.Module, entries: Mapping[str, Entries]) -> Iterator[Any]:
    """Set the gradient of frozen entries to zero as soon as it is there; yields the hooks.

    So that whoever clips gradients sees the norm of what trains.
    """
    for name, each in entries.items():
        if each.partial:
            parameter = model.get_parameter(name)
            frozen = (~each.trains).nonzero()[:, 0].to(parameter.device)
            # Found once: where the entries lie on this rank does not change from step to step.
            own, size = local_index(parameter, frozen, each.along), parameter.shape[each.dim]
            places = (own // size, own % size) if each.experts else (own,)
            hook = partial(_clear, each.dims, places)
            yield parameter.register_post_accumulate_grad_hook(hook)


def _clear(dims: tuple[int, ...], places: tuple[Tensor, ...], parameter: Tensor) -> None:
    assert parameter.grad is not None
    grad = local(parameter.grad)
    # [entries, ...], or [experts, entries of one, ...]
    grad.movedim(dims, tuple(range(len(dims)))).index_put_(places, grad.new_zeros(()))
