"""What is measured of models without an answer: margins, losses, and KL to the intact model.

One pass over the utility rows gives a model's KL and its loss. So the KL of all models is one step,
and the step of each model takes its loss from there and adds the margin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ssah.evaluation import divergences
from ssah.studies.evaluate.ablations import Evaluated
from ssah.studies.paired_measures import UTILITY, Evaluation, losses_of, measured_line
from ssah.studies.study import Study

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def measured(
    study: Study,
    evaluation: Evaluation,
    models: Sequence[Evaluated],
    compared: Mapping[str, Mapping[str, Any]],
) -> dict[str, dict[str, Any]]:
    """Refusal margin and losses, by name of the model: a step each.

    ``compared``: what :func:`compared` found, whose pass gives the loss as well.
    """
    found: dict[str, dict[str, Any]] = {}
    for each in models:
        known = None
        if each.name in compared:
            own = compared[each.name]
            log_probs = torch.tensor(own["log_prob"], dtype=torch.float64)
            known = {UTILITY: losses_of(log_probs, torch.tensor(own["tokens"]))}
        compute = partial(evaluation.measure, study.model, each.chosen, known=known)
        found[each.name] = study.steps(f"{each.name}.measured", compute, measured_line)
    return found


def comparable(
    models: Sequence[Evaluated],
    tokenizer: PreTrainedTokenizerBase,
    of_intact: PreTrainedTokenizerBase,
    *,
    same: bool,
) -> list[Evaluated]:
    """The models that have a distance to the intact one: it has none to itself.

    None of them where the two count tokens differently.
    """
    if same:
        return [each for each in models if each.chosen is not None]
    return list(models) if tokenizer.get_vocab() == of_intact.get_vocab() else []


def compared(
    study: Study,
    evaluation: Evaluation,
    models: Sequence[Evaluated],
    intact: PreTrainedModel | None,
) -> dict[str, dict[str, Any]]:
    """KL to the intact model on the utility rows, and their losses, of all models at once: a step.

    Name -> ``total``, ``tokens``, ``first`` and ``log_prob``, one value a row.
    """

    def compute() -> dict[str, Any]:
        loader, selections = evaluation.loaders[UTILITY], [each.chosen for each in models]
        found = divergences(study.model, loader, selections, intact=intact)
        return {
            each.name: {key: value.tolist() for key, value in vars(own).items()}
            for each, own in zip(models, found, strict=True)
        }

    found: dict[str, dict[str, Any]] = study.steps("compared", compute)
    return found
