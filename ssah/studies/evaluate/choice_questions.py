"""Multiple choice of each model: tasks of lm-eval, and questions with several right letters."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from ssah.evaluation import letter_log_probs, letter_scores, multiple_choice, without_bias
from ssah.interventions import ablate

if TYPE_CHECKING:
    from ssah.data import Lettered
    from ssah.studies.evaluate.ablations import Evaluated
    from ssah.studies.study import Study


def multiple_choices(
    study: Study, evaluated: Evaluated, manager: Any, questions: Sequence[Lettered]
) -> dict[str, Any]:
    """``tasks``, ``letters`` and ``letters_without_bias`` of one model, where there are any.

    Tasks are a step, and so are letters.

    Args:
        study: whose settings name the tasks.
        evaluated: the model.
        manager: the tasks' catalogue, as ``check_tasks`` returned it.
        questions: those with several right letters.
    """
    return {**_tasks(study, evaluated, manager), **_letters(study, evaluated, questions)}


def _tasks(study: Study, evaluated: Evaluated, manager: Any) -> dict[str, Any]:
    """Accuracy on the tasks, if there are any: a step."""
    settings = study.settings

    def compute() -> dict[str, Any]:
        with nullcontext() if evaluated.chosen is None else ablate(study.model, evaluated.chosen):
            return multiple_choice(
                study.model,
                study.tokenizer,
                settings.tasks,
                manager=manager,
                batch_size=settings.batch_size,
                level=settings.level,
            )

    if not settings.tasks:
        return {}
    return {"tasks": study.steps(f"{evaluated.name}.tasks", compute, ", ".join)}


def _letters(study: Study, evaluated: Evaluated, questions: Sequence[Lettered]) -> dict[str, Any]:
    """Right letters of the questions, if there are any: a step, which keeps log-probabilities."""
    settings = study.settings

    def compute() -> list[list[float]]:
        with nullcontext() if evaluated.chosen is None else ablate(study.model, evaluated.chosen):
            found = letter_log_probs(
                study.model, study.tokenizer, questions, batch_size=settings.batch_size
            )
        return [each.tolist() for each in found]

    if not questions:
        return {}
    # Log-probabilities are kept, not scores: those are made of them at every call.
    kept = study.steps(f"{evaluated.name}.letters", compute)
    log_probs = [torch.tensor(each, dtype=torch.float64) for each in kept]  # [letters] each
    options = {"level": settings.level, "seed": settings.seed}
    return {
        "letters": letter_scores(log_probs, questions, **options),
        "letters_without_bias": letter_scores(without_bias(log_probs), questions, **options),
    }
