"""How taking a selection out turns the way in which a set of prompts differ.

The states of all rows at one layer and position, one below the other, are M ``[rows, hidden]``. Its
leading left singular vectors U ``[rows, rank]`` say how the rows are weighted in the directions in
which they are largest. With U' of the model without a selection, and s_r the singular values of
U^T U':

    angle = sum over r of arccos(s_r)        radians; 0: the same weighting, whatever its directions

Example: of two rows, M = ((2, 0), (0, 1)) has U = (1, 0). If the first row falls to (0.5, 0), U' is
(0, 1), and the angle of rank 1 is a right one.

Source: Zhou et al., ICLR 2025, arXiv 2410.13708, eq. 11. Their states are taken after the final
norm, and their code has rank 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ssah.data import check_count
from ssah.deltas.subspaces import Subspace, principal_angles
from ssah.evaluation.selection_effects.arm_effects import layers_numbered
from ssah.interventions import arms
from ssah.models import as_it_was, check_backbone, check_whole
from ssah.representations import (
    Position,
    batches_at,
    check_positions,
    hidden_states,
    recorded,
)
from ssah.units import UnitSet

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def left_subspace_angles(
    model: PreTrainedModel,
    loader: Iterable[Mapping[str, Any]],
    selections: Sequence[UnitSet],
    *,
    layer: int,
    position: Position = "last",
    rank: int = 1,
    arms_at_once: int = 8,
) -> Tensor:
    """The angle between the left singular subspaces of hidden states, with and without a selection.

    It is of the whole set: no row has one by itself. Memory: ``arms_at_once * rows * hidden_size``
    numbers in float64. The loader is read once for so many selections.

    Args:
        model: it is left as it was.
        loader: batches as of `ssah.representations.represent`, the same ones in every iteration.
        selections: what is taken out, each by itself, in shared batches.
        layer, position: where, as of `effects`.
        rank: how many singular vectors.
        arms_at_once: as of `effects`.

    Returns:
        float64 ``[selections]``, from 0 to ``rank * pi / 2``.

    Raises:
        TypeError: a selection is neither a `UnitSet` nor a `Selection` of units and heads, or a
            batch is not of this form.
        ValueError: as of `effects`; a loader that can be read but once; states that do not span
            ``rank`` dimensions.
        FloatingPointError: states are NaN or infinite.
    """
    check_count("arms_at_once", arms_at_once)
    check_repeatable(loader)
    if not selections:
        raise ValueError("selections is empty, must have at least one")
    check_backbone(check_whole(model))
    arms(model, selections)  # refuses what is wrong before a batch is read
    (where,) = check_positions(position)
    (module,) = layers_numbered(model, [layer])
    every = [None, *selections]
    # Arms outside and batches inside: states of all rows are needed at once, but of few arms.
    spaces: list[Subspace] = []
    for start in range(0, len(every), arms_at_once):
        chunk = every[start : start + arms_at_once]
        states = _states(model, loader, chunk, module, where)
        spaces += [Subspace.spanned_by(each, rank) for each in states]
    angles = [float(principal_angles(spaces[0], space).sum()) for space in spaces[1:]]
    return torch.tensor(angles, dtype=torch.float64)


def left_subspace(
    model: PreTrainedModel,
    loader: Iterable[Mapping[str, Any]],
    *,
    layer: int,
    position: Position = "last",
    rank: int = 1,
) -> Subspace:
    """The left singular subspace of hidden states of a model as it is; interventions count.

    Args:
        model, loader, layer, position, rank: as of `left_subspace_angles`.

    Returns:
        Of R^rows.

    Raises:
        TypeError, FloatingPointError: as of `left_subspace_angles`.
        ValueError: the same, but the loader may be one that can be read once.
    """
    (at,) = check_positions(position)
    layers_numbered(model, [layer])
    states = [each[:, 0, layer] for each in hidden_states(model, loader, positions=(at,))]
    if not states:
        raise ValueError("loader is empty, must have at least one batch")
    return Subspace.spanned_by(torch.cat(states), rank)


def check_repeatable(loader: Iterable[Any]) -> None:
    """Refuse, with ValueError, what yields its batches once, where they are read several times."""
    if iter(loader) is loader:
        raise ValueError(
            f"loader is {type(loader).__name__}, which can be read once; it must yield its batches "
            "again and again: a DataLoader or a list"
        )


def _states(
    model: PreTrainedModel,
    loader: Iterable[Mapping[str, Any]],
    chunk: Sequence[UnitSet | None],
    layer: nn.Module,
    position: Position,
) -> Tensor:
    """What ``layer`` puts out under each arm, float64 ``[arms, rows, hidden]``."""
    found = []
    for batch, where in batches_at(model, loader, (position,)):
        with (
            as_it_was(model),
            torch.inference_mode(),
            arms(model, chunk) as run,
            recorded([layer], where) as states,
        ):
            # The backbone alone: no state needs the head.
            model.base_model(**run.repeat(batch.inputs), use_cache=False)
        found.append(states[layer][:, :, 0])  # [arms, rows, hidden]
    if not found:
        raise ValueError("loader is empty, must have at least one batch")
    every = torch.cat(found, 1)
    if not bool(every.isfinite().all()):
        raise FloatingPointError("hidden states are NaN or infinite")
    return every
