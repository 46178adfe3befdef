"""``ssah evaluate``: attack success with its controls, utility and tasks, as a resumable run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from ssah.data import template_record
from ssah.evaluation import (
    check_room,
    check_tasks,
    count_words,
    distinct_judges,
    fitting,
    identical_tokens,
    multiple_choice,
    prompts,
    room_of,
)
from ssah.interventions import ablate
from ssah.models import digest, move, weights_hash
from ssah.selections import Selection
from ssah.studies.evaluate.ablations import Ablation, Evaluated
from ssah.studies.evaluate.measuring import comparable, compared, measured
from ssah.studies.evaluate.record import BENIGN, INTACT, OVER_REFUSAL, REQUESTS, records
from ssah.studies.evaluate.settings import EvaluateSettings
from ssah.studies.loading import Loading
from ssah.studies.paired_measures import UTILITY, Evaluation, intact_coherence
from ssah.studies.study import Study
from ssah.units import family_of

if TYPE_CHECKING:
    from ssah.evaluation import Coherence

KIND = "evaluate"
_TRIED = 4  # requests that are answered once more, one by one


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

    Returns:
        the record of the run; its ``result`` has ``rows`` (one a model, system prompt and judge),
        ``models`` (one a model: margin, utility, KL, tasks), ``identical_tokens`` (of shared
        batches and of each model alone; None in float32), ``differences`` (of the utility loss) and
        ``asr_differences`` (one a pair of models), ``per_request`` and ``coherence``.

    Raises:
        ValueError, OSError: wrong input; all of it is checked before anything is generated.
    """
    study = Study(loading, out, KIND, settings, batch_size=settings.batch_size)
    ablations = [Ablation.parse(text) for text in settings.ablations]
    judges = distinct_judges(settings.judges, settings.max_new_tokens)
    for judge in judges:
        judge.check()
    manager = check_tasks(settings.tasks, settings.task_folder) if settings.tasks else None
    given = {REQUESTS: requests, OVER_REFUSAL: over_refusal, BENIGN: benign}
    read = {
        role: study.sources.requests(role, source)
        for role, source in given.items()
        if source is not None
    }
    rows = [] if utility is None else study.sources.rows(UTILITY, utility, measures=True)
    model = study.load()
    family_of(model)  # an unknown architecture is refused before anything is written
    # A model that was damaged by training would find its own nonsense coherent.
    scorer = (model, study.tokenizer) if intact is None else loading("auto", intact)
    asked = {role: _with_room(study, role, own) for role, own in read.items()}
    evaluation = Evaluation(study, asked[REQUESTS], {UTILITY: rows} if rows else {}, judges=judges)
    words = _words(evaluation)  # reads all rows: a bad one is refused before anything is written
    models = [Evaluated(INTACT), *_ablated(study, ablations)]
    # Steps: one for each list of requests under each system prompt, losses and margin, and tasks.
    per_model = len(settings.system_prompts) * len(asked) + 1 + bool(settings.tasks)
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
        judged = _judged(study, evaluation, models, asked, coherent)
        # With KL comes the loss, so that this is the only pass over the utility rows.
        other = None if intact is None else scorer[0]
        pairs = compared(study, evaluation, models, other) if far else {}
        own = measured(study, evaluation, models, pairs)
        distances = {each.name: pairs[each.name] for each in far}
        tasks = {each.name: _tasks(study, each, manager) for each in models}
        identical = _identical(study, models, asked[REQUESTS])
    names = [judge.name for judge in judges]
    found = records(models, names, judged, own, distances, tasks, words, settings)
    result = {
        "dtype": study.dtype,
        "coherence": coherent.describe(),
        "template": template_record(study.tokenizer),
        "identical_tokens": identical,
        "rows_read": {name: each.counts.to_dict() for name, each in evaluation.loaders.items()},
        **found,
    }
    return steps.run.finish(result)


def _with_room(study: Study, role: str, requests: list[str]) -> list[str]:
    """Requests that leave room for an answer under every system prompt; the record says how many
    do not."""
    settings, room = study.settings, room_of(study.model)  # None: the model has no such limit
    most = None if room is None else room - settings.max_new_tokens
    for system_prompt in settings.system_prompts:
        encoded = prompts(study.tokenizer, requests, system_prompt=system_prompt, name=role)
        overlong = study.loading.reading.overlong
        kept = fitting(requests, encoded, most, overlong=overlong, name=role)
        if len(kept) == len(requests):
            check_room(study.model, encoded, settings.max_new_tokens, role)
            continue
        record = study.sources.record[role]
        record["overlong"] = record.get("overlong", 0) + len(requests) - len(kept)
        requests = kept
    return requests


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
    asked: Mapping[str, Sequence[str]],
    coherent: Coherence,
) -> dict[tuple[str, int, str], dict[str, Any]]:
    """What was judged of each model, number of a system prompt, and list of requests."""
    return {
        (each.name, condition, role): own
        for condition, role in product(range(len(study.settings.system_prompts)), asked)
        for each, own in zip(
            models,
            _judged_list(study, evaluation, models, condition, role, asked[role], coherent),
            strict=True,
        )
    }


def _judged_list(
    study: Study,
    evaluation: Evaluation,
    models: Sequence[Evaluated],
    condition: int,
    role: str,
    requests: Sequence[str],
    coherent: Coherence,
) -> list[dict[str, Any]]:
    """What was judged of each model's answers to one list under one system prompt: a step a model.

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
            system_prompt=study.settings.system_prompts[condition],
        )

    return study.steps.together(names, compute, lambda found: _judged_line(found, role))


def _judged_line(found: Mapping[str, Any], role: str) -> str:
    shown, n = [], len(found["tokens"])
    for name, success in found["success"].items():
        share = sum(success) / n
        asr = role == REQUESTS  # of harmless requests, to fulfil them is no attack
        shown.append(f"{name} ASR {share:.0%}" if asr else f"{name} refused {1 - share:.0%}")
    return ", ".join([*shown, f"incoherent {sum(found['incoherent']) / n:.0%}"])


def _identical(
    study: Study, models: Sequence[Evaluated], requests: Sequence[str]
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
