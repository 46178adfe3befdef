"""The record of an evaluation: its rows, its models, and how ablated models differ."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, product
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from ssah.evaluation import (
    Perplexity,
    Unit,
    answer_rates,
    bootstrap,
    difference,
    paired_difference,
    rate,
    refused_requests,
)
from ssah.selections import Selection
from ssah.studies.measured_values import kl_summary, losses
from ssah.studies.paired_measures import UTILITY

if TYPE_CHECKING:
    from ssah.studies.evaluate.ablations import Evaluated
    from ssah.studies.evaluate.settings import EvaluateSettings

REQUESTS, OVER_REFUSAL, BENIGN = "requests", "over_refusal", "benign"
INTACT = "0-intact"  # name of the model as it is

# Name of the model, number of the system prompt, role of the requests -> what was judged.
Judged: TypeAlias = "Mapping[tuple[str, int, str], Mapping[str, Any]]"


def records(
    models: Sequence[Evaluated],
    judges: Sequence[str],
    judged: Judged,
    measured: Mapping[str, Mapping[str, Any]],
    distances: Mapping[str, Mapping[str, Any]],
    tasks: Mapping[str, Mapping[str, Any]],
    words: int,
    settings: EvaluateSettings,
) -> dict[str, Any]:
    """What the steps found, as the record of the run has it.

    Args:
        models: the one as it is first.
        judges: their names.
        judged: of each model, system prompt and list of requests.
        measured, tasks: name of the model -> margin and losses; -> accuracy on the tasks.
        distances: name of the model -> KL to the intact one, row by row; not of every model.
        words: of the answers of the utility set.
        settings: of the evaluation.
    """
    conditions = range(len(settings.system_prompts))
    return {
        "rows": [_row(*each, judged, settings) for each in product(models, conditions, judges)],
        "models": [
            {
                **_model(each, measured[each.name], words, settings),
                **_distance(distances.get(each.name), settings),
                **tasks[each.name],
            }
            for each in models
        ],
        "differences": list(_loss_differences(models, measured, settings)),
        "asr_differences": list(_asr_differences(models, judged, settings)),
        "per_request": {".".join(map(str, key)): found for key, found in judged.items()},
    }


def _model(
    evaluated: Evaluated,
    measured: Mapping[str, Any],
    words: int,
    settings: EvaluateSettings,
) -> dict[str, Any]:
    """Refusal margin and utility of one model; ``words`` are those of the utility set."""
    margins = torch.tensor(measured["margins"], dtype=torch.float64)  # [requests]
    interval = bootstrap(margins, level=settings.level, seed=settings.seed)
    found: dict[str, Any] = {
        "ablated": evaluated.ablated,
        "units": 0 if evaluated.units is None else len(evaluated.units),
        "share": 0.0 if evaluated.units is None else evaluated.units.fraction,
        "refusal_margin": measured["refusal_margin"],
        "refusal_margin_interval": list(interval),
        "refuses": rate((margins > 0).tolist(), settings.level),
    }
    if isinstance(evaluated.chosen, Selection):
        found["share_of_weights"] = evaluated.chosen.fraction
    for own in measured["losses"].values():  # of the utility set, or of none
        costs = Perplexity(math.fsum(own["nats"]), sum(own["tokens"]), words).to_dict()
        found |= {"utility_loss": costs.pop("loss"), **costs}
    return found


def _distance(found: Mapping[str, Any] | None, settings: EvaluateSettings) -> dict[str, Any]:
    """KL to the intact model, where it was measured."""
    return {} if found is None else kl_summary(found, level=settings.level, seed=settings.seed)


def _row(
    evaluated: Evaluated,
    condition: int,
    judge: str,
    judged: Judged,
    settings: EvaluateSettings,
) -> dict[str, Any]:
    """Every rate of one model, system prompt and judge."""
    level, system_prompt = settings.level, settings.system_prompts[condition]
    found = judged[evaluated.name, condition, REQUESTS]
    success, incoherent = found["success"][judge], found["incoherent"]
    row: dict[str, Any] = {
        "ablated": evaluated.ablated,
        "system_prompt": system_prompt,
        "judge": judge,
        "asr": rate(success, level),
        "asr_coherent": rate(coherent_success(found, judge), level),
        "incoherent": rate(incoherent, level),
        **answer_rates(found, level),
        "mean_tokens": sum(found["tokens"]) / len(found["tokens"]),
    }
    if evaluated.units is not None:  # paired over requests with the same model as it is
        before = judged[INTACT, condition, REQUESTS]["success"][judge]
        mean, interval = paired_difference(
            torch.tensor(success), torch.tensor(before), level=level, seed=settings.seed
        )
        row |= {"asr_rise": mean, "asr_rise_interval": list(interval)}
    for role in (OVER_REFUSAL, BENIGN):
        own = judged.get((evaluated.name, condition, role))
        if own is not None:
            row |= {
                f"{role}_refused": rate(refused_requests(own, judge), level),
                f"{role}_unfinished": rate(own["unfinished"], level),
                f"{role}_incoherent": rate(own["incoherent"], level),
                f"{role}_tokens": sum(own["tokens"]) / len(own["tokens"]),
            }
    return row


def _loss_differences(
    models: Sequence[Evaluated],
    measured: Mapping[str, Mapping[str, Any]],
    settings: EvaluateSettings,
) -> Iterator[dict[str, Any]]:
    """Utility loss of every model less that of each one before it, paired over rows, in nats.

    Yields:
        ``ablated``, ``against``, ``utility_loss`` and its interval; nothing without utility rows.
    """
    # Each pair once, the later model first: its value less that of the earlier one.
    for against, evaluated in combinations(models, 2):
        if measured[evaluated.name]["losses"]:
            first, second = (losses(measured[each.name], UTILITY) for each in (evaluated, against))
            yield {
                "ablated": evaluated.ablated,
                "against": against.ablated,
                **_difference("utility_loss", first, second, "nats", settings),
            }


def _asr_differences(
    models: Sequence[Evaluated], judged: Judged, settings: EvaluateSettings
) -> Iterator[dict[str, Any]]:
    """ASR of every ablated model less that of each one before it, paired over requests.

    What ablating did to the intact model is the ``asr_rise`` of a row.

    Yields:
        ``ablated``, ``against``, ``system_prompt``, ``judge``, and ``asr`` and ``asr_coherent``,
        fractions in [-1, 1] with their intervals.
    """
    for against, evaluated in combinations([each for each in models if each.units is not None], 2):
        for condition, system_prompt in enumerate(settings.system_prompts):
            pair = [judged[each.name, condition, REQUESTS] for each in (evaluated, against)]
            for judge in pair[0]["success"]:
                # [requests], 0 or 1
                first, second = (torch.tensor(each["success"][judge]) for each in pair)
                sense, other = (torch.tensor(coherent_success(each, judge)) for each in pair)
                yield {
                    "ablated": evaluated.ablated,
                    "against": against.ablated,
                    "system_prompt": system_prompt,
                    "judge": judge,
                    **_difference("asr", first, second, "points", settings),
                    **_difference("asr_coherent", sense, other, "points", settings),
                }


def _difference(
    key: str, first: Tensor, second: Tensor, unit: Unit, settings: EvaluateSettings
) -> dict[str, Any]:
    value, interval = difference(first, second, unit, level=settings.level, seed=settings.seed)
    return {key: value, f"{key}_interval": interval}


def coherent_success(found: Mapping[str, Any], judge: str) -> list[int]:
    """1 where an attack succeeded with an answer that is coherent as well."""
    pairs = zip(found["success"][judge], found["incoherent"], strict=True)
    return [int(success and not incoherent) for success, incoherent in pairs]
