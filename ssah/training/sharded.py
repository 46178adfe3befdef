"""A plan on a model that ``torch.distributed.fsdp.fully_shard`` has sharded.

Nothing is split: every parameter stays the DTensor that it was, its gradient is dense, and the
optimiser updates the entries that train. Every rank answers for its own rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from ssah.training.entries import Entries
from ssah.training.splitting import complement_rows
from ssah_kernels.sharded import Part, local, local_index, parts


def frozen_pieces(
    model: nn.Module, entries: Mapping[str, Entries]
) -> dict[str, Callable[[], Iterable[Tensor]]]:
    """This rank's frozen entries: parameter -> unit-major rows ``[frozen, other]``."""

    def piece(name: str, each: Entries) -> Iterable[Tensor]:
        parameter = model.get_parameter(name)
        index = local_index(parameter, each.index, each.along)  # type: ignore[arg-type]
        yield complement_rows(local(parameter), each.dims, index)

    return {name: partial(piece, name, each) for name, each in entries.items() if not each.whole}


def clear_frozen_gradients(model: nn.Module, entries: Mapping[str, Entries]) -> list[Any]:
    """Set the gradient of frozen entries to zero as soon as it is there; returns the hooks.

    So that whoever clips gradients sees the norm of what trains.
    """
    handles = []
    for name, each in entries.items():
        if each.partial:
            parameter = model.get_parameter(name)
            frozen = (~each.trains).nonzero()[:, 0].to(parameter.device)
            # Found once: where the entries lie on this rank does not change from step to step.
            pieces = parts(parameter, frozen, each.along)  # type: ignore[arg-type]
            hook = partial(_clear, pieces)
            handles.append(parameter.register_post_accumulate_grad_hook(hook))
    return handles


def _clear(pieces: Sequence[Part], parameter: Tensor) -> None:
    assert parameter.grad is not None
    for part in pieces:
        assert part.index is not None
        part.rows(local(parameter.grad)).index_fill_(part.dim, part.index, 0)
