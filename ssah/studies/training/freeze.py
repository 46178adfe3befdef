"""Freeze: does safety survive a benign fine-tune where its units cannot move (paper, tables 2, 3)?

Every arm trains on the same rows in the same order until it has the same training loss: that of a
fixed sample of the rows, which the arm that freezes nothing reaches with the passes that it is
given.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssah.groups import UnitGroups, classify
from ssah.report.pictures.study import plot_freeze
from ssah.studies.claims import claim, difference
from ssah.studies.inputs import Loading, Sources
from ssah.studies.measuring import UTILITY
from ssah.studies.training.arms import Arm, lora, planned
from ssah.studies.training.results import BEFORE, Arms, arms_summary, rates, row_losses
from ssah.studies.training.run import open_study
from ssah.studies.training.settings import FREEZE_ARMS, FreezeSettings
from ssah.training import freeze as frozen
from ssah.units import UnitSet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ssah.studies.training.arms import Trained

__all__ = ["ARMS", "FreezeSettings", "freeze"]

KIND = "freeze"
NONE, SCU, SCU_CU, RANDOM, SCU_ALL_CU, RANDOM_ALL, LORA = ARMS = FREEZE_ARMS
_SLACK = 0.05  # nats
STRONG = 0.15  # rise of the ASR with nothing frozen, below which there is little to keep


def freeze(
    loading: Loading,
    out: Path,
    settings: FreezeSettings,
    *,
    safety: str,
    utility: str,
    finetune: str,
    requests: Sequence[str],
    utility_eval: str,
    save_model: bool = False,
) -> dict[str, Any]:
    """Fine-tune an aligned model in every arm with every seed, and measure what is left of safety.

    Args:
        loading: of the model, which should be aligned.
        out: folder of the run.
        settings: of the study.
        safety, utility: rows to score units on.
        finetune: rows of the benign task.
        requests: harmful requests, for margin and ASR, none of them among ``safety``.
        utility_eval: rows for the utility loss.
        save_model: keep the fine-tuned models, ``out/models/none-0`` and the like.

    Returns:
        the record of the run; ``result`` has ``arms``, ``differences`` and ``claims``.
    """
    sources = Sources(loading.reading)
    rows = {"safety": sources.rows("safety", safety), "utility": sources.rows("utility", utility)}
    task = sources.rows("finetune", finetune)
    asked = sources.requests("requests", requests)
    held_out = {UTILITY: sources.rows("utility_eval", utility_eval)}
    with open_study(
        loading,
        out,
        KIND,
        settings,
        sources,
        scored=rows,
        trained={"finetune": task},
        requests=asked,
        held_out=held_out,
        arms=len(settings.arms),
        keep=save_model,
    ) as study:
        groups = classify(
            study.scores["safety"],
            study.scores["utility"],
            scu=settings.scu,
            ucu=settings.ucu,
            ru=settings.ru,
            scope=settings.scope,
            normalize=settings.normalize,
        )
        groups.save(out / "groups")
        arms = study.compare({name: _arm(name, groups, settings) for name in settings.arms})
    summaries = arms_summary(arms)
    rise = summaries[NONE]["mean"]["asr"] - summaries[BEFORE]["mean"]["asr"] if NONE in arms else 0
    result = {
        "dtype": study.dtype,
        "bf16": study.bf16,
        "varied": "frozen",
        "labels": {name: _label(name, settings) for name in (BEFORE, *settings.arms)},
        "frozen_units": {name: len(_units(name, groups, settings, 0)) for name in settings.arms},
        "units": sum(groups.sizes.values()),
        "strong_enough": rise >= STRONG,
        "arms": summaries,
        "differences": _differences(arms),
        "claims": _claims(arms, settings),
    }
    picture = plot_freeze(result, out / "freeze.png", f"{loading.name}: a benign fine-tune")
    return study.steps.run.finish(result, [picture])


def _units(name: str, groups: UnitGroups, settings: FreezeSettings, seed: int) -> UnitSet:
    """What an arm freezes."""
    if name in (NONE, LORA):
        return UnitSet({}, groups.sizes)
    if name == SCU:
        return groups["scu"]
    if name in (SCU_ALL_CU, RANDOM_ALL):
        chosen = groups["scu"] | groups["cu"]
    else:
        chosen = groups["scu"] | groups.top("cu", settings.cu)
    return UnitSet.random(chosen, seed=seed) if name in (RANDOM, RANDOM_ALL) else chosen


def _arm(name: str, groups: UnitGroups, settings: FreezeSettings) -> Arm:
    if name == LORA:
        rate = settings.lora_lr or 10 * settings.lr
        return Arm(rate, lambda model, seed: lora(model, settings.lora_rank))

    def prepare(model: PreTrainedModel, seed: int) -> Trained:
        return planned(frozen(model, _units(name, groups, settings, seed)))

    return Arm(settings.lr, prepare)


def _label(name: str, settings: FreezeSettings) -> str:
    labels: dict[str, str] = {
        BEFORE: "(before)",
        NONE: "nothing",
        SCU: "SCU",
        SCU_CU: f"SCU + {100 * settings.cu:g} % CU",
        RANDOM: "as many random",
        SCU_ALL_CU: "SCU + all CU",
        RANDOM_ALL: "as many random",
        LORA: f"(LoRA, rank {settings.lora_rank})",
    }
    return labels[name]


def _differences(arms: Arms) -> list[dict[str, Any]]:
    """Every arm against no freezing and against its random units: ASR and utility loss."""
    found = []
    for name in arms:
        control = RANDOM_ALL if name == SCU_ALL_CU else RANDOM
        for other in (NONE, control):
            if name in (BEFORE, other) or other not in arms:
                continue
            pair = {"arm": name, "against": other}
            asr = difference(rates(arms, name), rates(arms, other), "points")
            loss = difference(row_losses(arms, name), row_losses(arms, other), "nats")
            for what, unit, (value, (low, high)) in (
                ("asr", "points", asr),
                ("utility_loss", "nats", loss),
            ):
                numbers = {"value": value, "interval": [low, high], "half_width": (high - low) / 2}
                found.append({**pair, "what": what, **numbers, "unit": unit})
    return found


def _claims(arms: Arms, settings: FreezeSettings) -> list[dict[str, Any]]:
    cu = f"SCU + {100 * settings.cu:g} % CU"
    lower = (
        (SCU_CU, NONE, f"Freezing {cu} keeps the ASR below that with nothing frozen"),
        (
            SCU_CU,
            RANDOM,
            f"Freezing {cu} keeps the ASR below that with as many random units frozen",
        ),
        (SCU_CU, LORA, f"Freezing {cu} keeps the ASR below that of LoRA"),
        (SCU_ALL_CU, NONE, "Freezing SCU + all CU keeps the ASR below that with nothing frozen"),
        (
            SCU_ALL_CU,
            RANDOM_ALL,
            "Freezing SCU + all CU keeps the ASR below that with as many random units frozen",
        ),
        (SCU_ALL_CU, SCU_CU, f"Freezing SCU + all CU keeps the ASR below that with {cu} frozen"),
    )
    claims = []
    if NONE in arms:
        text = "The fine-tune with nothing frozen raises the ASR"
        claims.append(claim(text, rates(arms, NONE), rates(arms, BEFORE), "higher", "points"))
    for first, second, text in lower:
        if first in arms and second in arms:
            values = rates(arms, first), rates(arms, second)
            note = _missed(arms, (first, second))
            claims.append(claim(text, *values, "lower", "points", note=note))
    if SCU_CU in arms and NONE in arms:
        text = (
            f"Freezing {cu} costs less than {_SLACK:g} nats of utility loss more than no freezing"
        )
        values = row_losses(arms, SCU_CU), row_losses(arms, NONE)
        claims.append(claim(text, *values, "not higher", "nats", slack=_SLACK, among="rows"))
    return claims


def _missed(arms: Arms, names: tuple[str, ...]) -> str:
    """A sentence on the arms whose training loss is not that of the first one."""
    missed = [
        f"{name} (seed {seed})"
        for name in names
        for seed, found in arms[name].items()
        if found["training"]["reached"] is False
    ]
    return f"Training loss not reached by {', '.join(missed)}." if missed else ""
