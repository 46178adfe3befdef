"""What is measured of each model beside its answers: margin, losses, KL, and equal tokens.

One pass over the utility rows gives the KL to the intact model and the loss of all models at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ssah.evaluation import divergences, identical_tokens
from ssah.studies.evaluate.ablations import Evaluated
from ssah.studies.measured_values import losses_beside, measured_line
from ssah.studies.paired_measures import UTILITY, Evaluation
from ssah.studies.study import Study

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ssah.evaluation import Request

_TRIED = 4  # requests that are answered once more, one by one


def measured(
    study: Study,
    evaluation: Evaluation,
    evaluated: Evaluated,
    beside: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Refusal margin and losses of one model: a step.

    ``beside``: what :func:`compared` found, whose pass gives the loss as well.
    """
    known = {UTILITY: losses_beside(beside[evaluated.name])} if beside else None
    compute = partial(evaluation.measure, study.model, evaluated.chosen, known=known)
    found: dict[str, Any] = study.steps(f"{evaluated.name}.measured", compute, measured_line)
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


def identical(
    study: Study, models: Sequence[Evaluated], requests: Sequence[Request]
) -> dict[str, Any] | None:
    """How many tokens of a few answers are those of each model alone; None: all, in float32."""
    if study.dtype == "float32":
        return None

    def compute() -> dict[str, Any]:
        return identical_tokens(
            study.model,
            study.tokenizer,
            requests[:_TRIED],
            [each.chosen for each in models],
            max_new_tokens=study.settings.max_new_tokens,
            system_prompt=study.settings.system_prompts[0],
        )

    # Not counted in the bar, whose length is set before the precision is chosen.
    found: dict[str, Any] = study.steps.run.step("identical", compute)
    return found
