"""A model as a harness asks for it by text: with an update of it, and with units switched off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ssah.evaluation.generating import Finite
from ssah.groups import UnitGroups
from ssah.interventions import ablate as ablate_units
from ssah.models import quiet
from ssah.selections import check_named, named, names_groups
from ssah.training import load_trained

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_ablated(
    model: str,
    *,
    update: str | None = None,
    groups: str | None = None,
    ablate: str | Sequence[str] = (),
    **weights: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model of which units put nothing out, for good: whoever asked for it has no other.

    Example: ``load_ablated("smollm2", groups="runs/groups", ablate="scu")``. A harness would score
    logits that are NaN as an answer; the model raises FloatingPointError in their place.

    Args:
        model: as `ssah.models.load_model` takes it, or an update with its base.
        update: an update of ``model``, which is merged first.
        groups: the folder that ``ssah classify`` wrote, where ``ablate`` names groups.
        ablate: what to switch off, one text or several: ``"scu"``, ``"heads:2.26"``, as
            `ssah.select` takes it.
        weights: ``dtype``, ``device`` and ``trust_remote_code`` of `ssah.models.load_model`.

    Raises:
        ModelError: as of `ssah.models.load_model`.
        ValueError: groups are named and not given, or given and not named, or are of another model;
            the model lacks what ``ablate`` names.
    """
    texts = [ablate] if isinstance(ablate, str) else list(ablate)
    if names_groups(texts) != (groups is not None):
        raise ValueError(
            f"ablate is {texts} and groups is {groups!r}: groups must be given where ablate names "
            "scu, ucu, ru or cu, and nowhere else"
        )
    # Groups and texts are looked at before the model is loaded, which may take minutes.
    if texts:
        check_named(texts, None if groups is None else UnitGroups.load(groups))
    with quiet():
        if update is None:
            loaded, tokenizer = load_trained(model, **weights)
        else:
            loaded, tokenizer = load_trained(update, base=model, **weights)
    if texts:
        own = None if groups is None else UnitGroups.load(groups, loaded)
        ablate_units(loaded, named(loaded, texts, own, shared="all")).__enter__()
    loaded.register_forward_hook(_check_logits)
    return loaded, tokenizer


def _check_logits(model: PreTrainedModel, given: Any, output: Any) -> None:
    finite = Finite()
    finite.see(output.logits)
    finite.check()
