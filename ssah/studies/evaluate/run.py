"""``ssah evaluate``: attack success with its controls, utility and tasks, as a resumable run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ssah.data import template_record
from ssah.evaluation import (
    check_room,
    check_tasks,
    count_words,
    distinct_judges,
    fitting,
    multiple_choice,
    prompts,
    room_of,
)
from ssah.interventions import ablate
from ssah.models import digest, move, weights_hash
from ssah.storage import check_free
from ssah.studies.evaluate.arms import Ablation, Arm
from ssah.studies.evaluate.record import (
    BENIGN,
    OVER_REFUSAL,
    REQUESTS,
    asr_differences,
    loss_differences,
    model_record,
    row_record,
)
from ssah.studies.evaluate.settings import EvaluateSettings
from ssah.studies.inputs import Loading, Sources
from ssah.studies.measuring import UTILITY, Evaluation, intact_coherence, measured_line
from ssah.studies.run import Run
from ssah.studies.steps import Steps
from ssah.units import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["KIND", "EvaluateSettings", "evaluate"]

KIND = "evaluate"


def evaluate(
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
        ``models`` (one a model: margin, utility, tasks), ``differences`` (of the utility loss) and
        ``asr_differences`` (one a pair of models), ``per_request`` and ``coherence``.

    Raises:
        ValueError, OSError: wrong input; all of it is checked before anything is generated.
    """
    check_free(out)
    ablations = [Ablation.parse(text) for text in settings.ablations]
    judges = distinct_judges(settings.judges, settings.max_new_tokens)
    for judge in judges:
        judge.check()
    manager = check_tasks(settings.tasks, settings.task_folder) if settings.tasks else None
    sources = Sources(loading.reading)
    asked = {
        role: sources.requests(role, source)
        for role, source in ((REQUESTS, requests), (OVER_REFUSAL, over_refusal), (BENIGN, benign))
        if source is not None
    }
    rows = [] if utility is None else sources.rows(UTILITY, utility)
    model, tokenizer = loading("auto")
    family_of(model)  # an unknown architecture is refused before anything is written
    scorer = (model, tokenizer) if intact is None else loading("auto", intact)
    room = room_of(model)
    most = None if room is None else room - settings.max_new_tokens
    for system_prompt in settings.system_prompts:
        for role, own in asked.items():
            encoded = prompts(tokenizer, own, system_prompt=system_prompt, name=role)
            kept = fitting(own, encoded, most, overlong=loading.reading.overlong, name=role)
            if len(kept) == len(own):
                check_room(model, encoded, settings.max_new_tokens, role)
                continue
            left_out = sources.record[role].get("overlong", 0) + len(own) - len(kept)
            asked[role], sources.record[role]["overlong"] = kept, left_out
    evaluation = Evaluation(
        tokenizer,
        asked[REQUESTS],
        {UTILITY: rows} if rows else {},
        judges=judges,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        max_length=settings.max_length,
        overlong=loading.reading.overlong,
    )
    batches = [batch for loader in evaluation.loaders.values() for batch in loader]
    words = count_words((row for batch in batches for row in batch["labels"].tolist()), tokenizer)
    arms = [Arm("0-intact")]
    for number, each in enumerate(ablations, start=1):
        units = each.units(model, settings.seed)
        name = f"{number}-{each.group}" + ("-random" if each.random else "")
        arms.append(Arm(name, str(each), units))
        sources.record[str(each)] = {
            "source": each.folder,
            "rows": len(units),
            "fingerprint": digest(units[module] for module in units),
        }
    weights = weights_hash(model)
    identity = {
        **loading.settings(),
        "weights": weights,
        "intact": intact,
        "intact_weights": weights if scorer[0] is model else weights_hash(scorer[0]),
        **asdict(settings),
        "judges": [each.describe() for each in judges],
    }
    run = Run(out, KIND, identity, sources.record)
    per_arm = len(settings.system_prompts) * len(asked) + 1 + bool(settings.tasks)
    with Steps(run, 2 + len(arms) * per_arm) as steps:
        dtype, _ = loading.precision(steps, model.device)
        move(model, getattr(torch, dtype))
        move(scorer[0], getattr(torch, dtype))
        coherent = intact_coherence(steps, *scorer, settings.batch_size)

        def answers(arm: Arm, condition: int, role: str) -> dict[str, Any]:
            name = f"{arm.name}.prompt{condition}.{role}"
            compute = partial(
                evaluation.judged,
                steps,
                name,
                model,
                coherent,
                asked[role],
                ablated=arm.units,
                system_prompt=settings.system_prompts[condition],
            )
            found: dict[str, Any] = steps(name, compute, lambda found: _judged_line(found, role))
            return found

        judged = {
            (arm.name, condition, role): answers(arm, condition, role)
            for arm in arms
            for condition in range(len(settings.system_prompts))
            for role in asked
        }
        measured = {
            arm.name: steps(
                f"{arm.name}.measured",
                partial(evaluation.measure, model, arm.units),
                measured_line,
            )
            for arm in arms
        }
        tasks = {arm.name: _tasks(steps, model, tokenizer, arm, settings, manager) for arm in arms}
    result = {
        "dtype": dtype,
        "coherence": coherent.describe(),
        "template": template_record(tokenizer),
        "rows_read": {name: each.counts.to_dict() for name, each in evaluation.loaders.items()},
        "rows": [
            row_record(arm, condition, each.name, judged, settings)
            for arm in arms
            for condition in range(len(settings.system_prompts))
            for each in judges
        ],
        "models": [
            model_record(arm, measured[arm.name], tasks[arm.name], words, settings) for arm in arms
        ],
        "differences": list(loss_differences(arms, measured, settings)),
        "asr_differences": list(asr_differences(arms, judged, settings)),
        "per_request": {".".join(map(str, key)): found for key, found in judged.items()},
    }
    return run.finish(result)


def _judged_line(found: Mapping[str, Any], role: str) -> str:
    shown, n = [], len(found["tokens"])
    for name, success in found["success"].items():
        share = sum(success) / n
        asr = role == REQUESTS
        shown.append(f"{name} ASR {share:.0%}" if asr else f"{name} refused {1 - share:.0%}")
    return ", ".join([*shown, f"incoherent {sum(found['incoherent']) / n:.0%}"])


def _tasks(
    steps: Steps,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    arm: Arm,
    settings: EvaluateSettings,
    manager: Any,
) -> dict[str, Any]:
    """Accuracy on the tasks, if there are any: a step."""

    def compute() -> dict[str, Any]:
        with nullcontext() if arm.units is None else ablate(model, arm.units):
            return multiple_choice(
                model,
                tokenizer,
                settings.tasks,
                manager=manager,
                batch_size=settings.batch_size,
                level=settings.level,
            )

    return {"tasks": steps(f"{arm.name}.tasks", compute, ", ".join)} if settings.tasks else {}
