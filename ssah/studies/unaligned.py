"""The model before alignment, which some methods and views need: checked before all else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ssah.deltas import Deltas
from ssah.models import weights_hash

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ssah.studies.study import Study


def unaligned_settings(study: Study, name: str | None) -> dict[str, str]:
    """What the record of a study says of the model before alignment; nothing where there is none.

    The model is loaded and let go, so that a wrong one is refused before anything is computed.

    Args:
        study: whose model is the aligned one, as it was loaded.
        name: as ``Loading`` takes it; None: not given.

    Raises:
        ValueError, OSError: there is none of this name, or as of `unaligned_hash`.
    """
    if name is None:
        return {}
    found = unaligned_hash(name, study.loading("auto", name)[0], study.model, study.weights)
    # With the weights: a folder of the same name may hold another model by now.
    return {"unaligned": name, "unaligned_weights": found}


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
