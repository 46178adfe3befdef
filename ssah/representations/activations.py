"""Activations of units, row by row: what enters every B at a few positions.

Example: a down projection of 3 units gets (0, 2, 1) at the last token of one prompt and (1, 0, 1)
at that of another. Its activations are the matrix ``[rows, units]`` of these two rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ssah.choices import Kind
from ssah.distributed import check_not_sharded
from ssah.models import as_it_was, check_backbone, check_whole
from ssah.representations.positions import Position, StatePositions, check_positions
from ssah.representations.recording import batches_at
from ssah.units import find_modules


def unit_activations(
    model: nn.Module,
    loader: Iterable[Mapping[str, Any]],
    *,
    modules: Iterable[Kind] = ("mlp",),
    position: Position = "last",
) -> dict[str, Tensor]:
    """The activations of all units on every row, in one pass of the backbone.

    Args:
        model: a transformers model of a known family; it is left as it was.
        loader: batches, as of `represent`.
        modules: which kinds of depth-2 module. Routed experts are left out: each sees other rows.
        position: at which token, as of `represent`.

    Returns:
        B's name -> float64 ``[rows, units]`` on the CPU, rows in the order of the loader.

    Raises:
        TypeError, ValueError: as of `represent`; or there is no module of these kinds.
        FloatingPointError: activations are NaN or infinite; the module is named.
    """
    where = check_positions(position)
    whole = check_whole(model)
    check_not_sharded(whole)
    check_backbone(whole)
    kinds = tuple(modules)
    found = {n: m for n, m in find_modules(whole).items() if m.kind in kinds and m.routed is None}
    if not found:
        raise ValueError(
            f"modules is {list(kinds)}, of which the model {type(whole).__name__} has none but "
            "routed experts; choose another kind"
        )
    parts: dict[str, list[Tensor]] = {name: [] for name in found}
    for batch, positions in batches_at(whole, loader, where):
        with as_it_was(whole), ExitStack() as stack, torch.inference_mode():
            for name, module in found.items():
                read = _reader(name, positions, parts[name])
                stack.callback(module.down.register_forward_pre_hook(read).remove)
            whole.base_model(**batch.inputs, use_cache=False)
    if not all(parts.values()):
        raise ValueError("loader yielded no batch, must yield at least one")
    return {name: torch.cat(own) for name, own in parts.items()}


def _reader(name: str, positions: StatePositions, parts: list[Tensor]) -> Any:
    """A hook that keeps what enters a B, ``[rows, length, units]`` or flat, at the positions."""
    rows, _, length = positions.mask.shape

    def read(_: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].reshape(rows, length, -1)  # some models flatten rows and length
        taken = positions.take(x)[0, :, 0].cpu()  # [rows, units]
        if not bool(taken.isfinite().all()):
            raise FloatingPointError(f"activations that enter {name!r} are NaN or infinite")
        parts.append(taken.clone())

    return read
