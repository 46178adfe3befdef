"""The model before alignment, which some methods and views need: checked before all else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ssah.deltas import Deltas
from ssah.models import weights_hash

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def unaligned_hash(
    name: str, before: PreTrainedModel, aligned: PreTrainedModel, aligned_hash: str
) -> str:
    """Hash of the weights of the model before alignment, for the record of a run.

    Args:
        name: of that model, for messages.
        before, aligned: both models, as they are stored.
        aligned_hash: of the weights of the aligned one.

    Raises:
        ValueError: both have the same weights, or are not of one shape.
    """
    called = f"the model before alignment (--unaligned) is {name!r}, which"
    try:
        Deltas(before, [aligned])  # names and shapes alone
    except ValueError as error:
        raise ValueError(f"{called} does not fit the aligned model: {error}") from error
    found = weights_hash(before)
    # Nothing would have been aligned, and every difference of the two would be 0.
    if found == aligned_hash:
        raise ValueError(f"{called} has the weights of the aligned model; it must be another one")
    return found
