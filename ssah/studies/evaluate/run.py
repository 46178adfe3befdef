"""``ssah evaluate``: attack success with its controls, utility and tasks, as a resumable run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ssah.data import template_record
from ssah.evaluation import (
    check_tasks,
    count_words,
)
from ssah.models import digest, move, weights_hash
from ssah.selections import Selection
from ssah.studies.choosing import ALL, Choosing
from ssah.studies.evaluate.ablations import Ablation, Evaluated
from ssah.studies.evaluate.asking import (
    POLICIES,
    answerable,
    lists_asked,
    read_lists,
    said_before,
    split_judges,
)
from ssah.studies.evaluate.beside_answers import comparable, compared, identical, measured
from ssah.studies.evaluate.choice_questions import multiple_choices
from ssah.studies.evaluate.record import INTACT, REQUESTS, records
from ssah.studies.evaluate.row_records import by_row
from ssah.studies.evaluate.settings import EvaluateSettings
from ssah.studies.loading import Loading
from ssah.studies.paired_measures import UTILITY, Evaluation, checked_judges, intact_coherence
from ssah.studies.study import Study
from ssah.units import family_of

if TYPE_CHECKING:
    from ssah.evaluation import Coherence, Judge, Request

KIND = "evaluate"


def run_evaluation(
    loading: Loading,
    out: str | os.PathLike[str],
    settings: EvaluateSettings,
    *,
    requests: str | Sequence[str],
    over_refusal: str | None = "builtin:overrefusal",
    benign: str | None = "builtin:utility_eval",
    utility: str | None = "builtin:utility_eval",
    intact: str | None = None,
    choosing: Choosing = ALL,
    policy: str | None = None,
    letters: str | None = None,
) -> dict[str, Any]:
    """Evaluate a model, as it is and with units taken out; resumable.

    Args:
        loading: of the model.
        out: folder of the run.
        settings: of the evaluation.
        requests: harmful requests, as ``ssah.data.load_requests`` takes them.
        over_refusal: harmless requests that look dangerous; None leaves them out.
        benign: ordinary instructions; None leaves them out.
        utility: rows with answers, as ``ssah.data.load_rows`` takes them; None leaves them out.
        intact: the model that scores coherence, where it is another one (before training, say).
        choosing: which of the requests are asked, and by what their rates are told apart.
        policy: requests with a policy of their own, as ``ssah.data.load_asked`` takes them.
        letters: multiple-choice questions, as ``ssah.data.load_lettered`` takes them.

    Returns:
        the record of the run; its ``result`` has ``rows`` (one a model, system prompt and judge),
        ``models`` (one a model: margin, utility, KL, tasks, letters), ``identical_tokens`` (of
        shared batches and of each model alone; None in float32), ``differences`` (of the utility
        loss) and ``asr_differences`` (one a pair of models), ``per_request`` and ``coherence``;
        with categories ``by_category`` (one a row of ``rows`` and column), with policies
        ``policies`` (one a model and judge).

    Raises:
        ValueError, OSError: wrong input; all of it is checked before anything is generated.
    """
    study = Study(loading, out, KIND, settings, batch_size=settings.batch_size)
    ablations = [Ablation.parse(text) for text in settings.ablations]
    judges = checked_judges(settings)
    refusals, of_policies = split_judges(judges, policy)
    manager = check_tasks(settings.tasks, settings.task_folder) if settings.tasks else None
    read = read_lists(study.sources, requests, over_refusal, benign, policy, choosing)
    questions = [] if letters is None else study.sources.lettered("letters", letters)
    rows = [] if utility is None else study.sources.rows(UTILITY, utility, measures=True)
    model = study.load()
    family_of(model)  # an unknown architecture is refused before anything is written
    # A model that was damaged by training would find its own nonsense coherent.
    scorer = (model, study.tokenizer) if intact is None else loading("auto", intact)
    asked = {role: answerable(study, role, own) for role, own in read.items()}
    losses = {UTILITY: rows} if rows else {}
    evaluation = Evaluation(study, asked[REQUESTS], losses, judges=refusals)
    words = _words(evaluation)  # reads all rows: a bad one is refused before anything is written
    models = [Evaluated(INTACT), *_ablated(study, ablations)]
    # Steps: one for each list of requests under each system prompt, losses and margin, and tasks.
    per_model = len(lists_asked(asked, settings)) + 1 + bool(settings.tasks) + bool(questions)
    far = comparable(models, study.tokenizer, scorer[1], same=intact is None) if rows else []
    with study.under_way(
        2 + len(models) * per_model + bool(far),
        intact=intact,
        intact_weights=study.weights if scorer[0] is model else weights_hash(scorer[0]),
        judges=[each.describe() for each in judges],  # what they are now, in place of their names
    ) as steps:
        # The model itself was moved already; that this is it again does no harm.
        move(scorer[0], getattr(torch, study.dtype))
        coherent = intact_coherence(study, *scorer)
        judged = _judged(study, evaluation, models, asked, coherent, of_policies)
        # With KL comes the loss, so that this is the only pass over the utility rows.
        other = None if intact is None else scorer[0]
        beside = compared(study, evaluation, models, other) if far else {}
        margins = {each.name: measured(study, evaluation, each, beside) for each in models}
        distances = {each.name: beside[each.name] for each in far}
        tasks = {each.name: multiple_choices(study, each, manager, questions) for each in models}
        alike = identical(study, models, asked[REQUESTS])
    names = [judge.name for judge in refusals]
    found = records(models, names, judged, margins, distances, tasks, words, settings)
    result = {
        "dtype": study.dtype,
        "coherence": coherent.describe(),
        "template": template_record(study.tokenizer),
        "identical_tokens": alike,
        "rows_read": {name: each.counts.to_dict() for name, each in evaluation.loaders.items()},
        **found,
        **by_row(models, names, judged, asked, choosing, settings),
    }
    return steps.run.finish(result)


def _ablated(study: Study, ablations: Sequence[Ablation]) -> list[Evaluated]:
    """The model with the units of each ablation out; which these are is recorded as data."""
    models = []
    for number, each in enumerate(ablations, start=1):
        chosen = each.chosen(study.model, study.settings.seed)
        if isinstance(chosen, Selection):
            units, parts = chosen.units, [chosen[name].bits for name in chosen]
        else:
            units, parts = chosen, [chosen[name] for name in chosen]
        # Numbered, because two ablations may be of the same group in two folders.
        name = f"{number}-{each.group}" + ("-random" if each.random else "")
        models.append(Evaluated(name, str(each), chosen, units))
        study.sources.record[str(each)] = {
            "source": each.source,
            "rows": len(units),
            "fingerprint": digest(parts),
        }
    return models


def _words(evaluation: Evaluation) -> int:
    """Words of the answers of the utility set, by which models of other tokenizers compare."""
    batches = [batch for loader in evaluation.loaders.values() for batch in loader]
    labels = (row for batch in batches for row in batch["labels"].tolist())
    return count_words(labels, evaluation.study.tokenizer)


def _judged(
    study: Study,
    evaluation: Evaluation,
    models: Sequence[Evaluated],
    asked: Mapping[str, Sequence[Request]],
    coherent: Coherence,
    of_policies: Sequence[Judge],
) -> dict[tuple[str, int, str], dict[str, Any]]:
    """What was judged of each model, number of a system prompt, and list of requests."""
    return {
        (each.name, condition, role): own
        for condition, role in lists_asked(asked, study.settings)
        for each, own in zip(
            models,
            _judged_list(
                study,
                evaluation,
                models,
                condition,
                role,
                asked[role],
                coherent,
                of_policies if role == POLICIES else (),
            ),
            strict=True,
        )
    }


def _judged_list(
    study: Study,
    evaluation: Evaluation,
    models: Sequence[Evaluated],
    condition: int,
    role: str,
    requests: Sequence[Request],
    coherent: Coherence,
    further: Sequence[Judge],
) -> list[dict[str, Any]]:
    """What was judged of each model's answers to one list under one system prompt: a step a model.

    ``further`` judges judge this list alone.

    The models that have not answered yet do so together.
    """
    names = [f"{each.name}.prompt{condition}.{role}" for each in models]

    def compute(left: Sequence[int]) -> list[dict[str, Any]]:
        return evaluation.judged(
            [names[i] for i in left],
            study.model,
            coherent,
            requests,
            selections=[models[i].chosen for i in left],
            system_prompt=said_before(condition, role, study.settings),
            judges=further,
        )

    return study.steps.together(names, compute, lambda found: _judged_line(found, role))


def _judged_line(found: Mapping[str, Any], role: str) -> str:
    shown, n = [], len(found["tokens"])
    for name, success in found["success"].items():
        share = sum(success) / n
        asr = role == REQUESTS  # of harmless requests, to fulfil them is no attack
        shown.append(f"{name} ASR {share:.0%}" if asr else f"{name} refused {1 - share:.0%}")
    return ", ".join([*shown, f"incoherent {sum(found['incoherent']) / n:.0%}"])
