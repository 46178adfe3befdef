"""Budget: safety alignment of everything, and of the redundant units alone (paper, table 4).

Both arms train on the same refusals and ordinary answers, half of each in every batch. The loss of
a fixed sample of the refusals is the alignment loss: the arm that trains everything takes the steps
that it is given, and the other one trains until its alignment loss is as low. What that costs on
ordinary answers and on mathematics is the alignment tax.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssah.groups import classify
from ssah.report.pictures.study import plot_budget
from ssah.studies.claims import claim
from ssah.studies.inputs import Loading, Sources
from ssah.studies.measuring import MATH, UTILITY
from ssah.studies.training.arms import Arm, planned
from ssah.studies.training.results import BEFORE, Arms, arms_summary, rates, row_losses
from ssah.studies.training.run import open_study
from ssah.studies.training.settings import BudgetSettings
from ssah.training import freeze, train_only
from ssah.units import UnitSet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ssah.studies.training.arms import Trained

__all__ = ["ARMS", "BudgetSettings", "budget"]

KIND = "budget"
FULL, RU = "full", "ru"
ARMS = {BEFORE: "(before)", FULL: "everything", RU: "RU alone"}
_NOUNS = {UTILITY: "ordinary answers", MATH: "mathematics"}


def budget(
    loading: Loading,
    out: Path,
    settings: BudgetSettings,
    *,
    safety: str,
    utility: str,
    requests: Sequence[str],
    utility_eval: str,
    math: str | None = None,
    save_model: bool = False,
) -> dict[str, Any]:
    """Align a model in both ways, and measure what it costs.

    Args:
        loading: of the model, which should not be aligned.
        out: folder of the run.
        settings: of the study.
        safety: refusals, to score units on and to train on.
        utility: ordinary answers, likewise.
        requests: harmful requests, for margin and ASR, none of them among ``safety``.
        utility_eval: rows for the utility loss.
        math: rows for the loss on mathematics, or None.
        save_model: keep the aligned models, ``out/models/full-0`` and the like.

    Returns:
        the record of the run; ``result`` has ``arms`` and ``claims``.
    """
    sources = Sources(loading.reading)
    rows = {"safety": sources.rows("safety", safety), "utility": sources.rows("utility", utility)}
    asked = sources.requests("requests", requests)
    held_out = {UTILITY: sources.rows("utility_eval", utility_eval)}
    if math is not None:
        held_out[MATH] = sources.rows("math", math)
    with open_study(
        loading,
        out,
        KIND,
        settings,
        sources,
        scored=rows,
        trained=rows,
        requests=asked,
        held_out=held_out,
        arms=2,
        keep=save_model,
    ) as study:
        groups = classify(
            study.scores["safety"],
            study.scores["utility"],
            scu=0.0,
            ucu=0.0,
            ru=settings.ru,
            scope=settings.scope,
            normalize=settings.normalize,
        )
        groups.save(out / "groups")

        def everything(model: PreTrainedModel, seed: int) -> Trained:
            return planned(freeze(model, UnitSet({}, groups.sizes)))

        def redundant(model: PreTrainedModel, seed: int) -> Trained:
            return planned(train_only(model, groups["ru"]))

        arms = study.compare(
            {
                FULL: Arm(settings.lr, everything),
                RU: Arm(settings.ru_lr or settings.lr, redundant),
            }
        )
    result = {
        "dtype": study.dtype,
        "bf16": study.bf16,
        "varied": "trained",
        "labels": ARMS,
        "units": {RU: len(groups["ru"]), "all": sum(groups.sizes.values())},
        "arms": arms_summary(arms),
        "claims": _claims(arms, settings, list(held_out)),
    }
    picture = plot_budget(result, out / "budget.png", f"{loading.name}: what alignment costs")
    return study.steps.run.finish(result, [picture])


def _claims(arms: Arms, settings: BudgetSettings, held_out: Sequence[str]) -> list[dict[str, Any]]:
    before, full, ru = (rates(arms, name) for name in (BEFORE, FULL, RU))
    missed = [str(seed) for seed, found in arms[RU].items() if not found["training"]["reached"]]
    note = (
        f"RU alone did not reach the alignment loss (seed {', '.join(missed)})." if missed else ""
    )
    claims = [
        claim("Training everything lowers the ASR", full, before, "lower", "points"),
        claim("Training RU alone lowers the ASR", ru, before, "lower", "points", note=note),
        claim(
            f"RU alone reaches the ASR of training everything, to {100 * settings.slack:g} points",
            ru,
            full,
            "not higher",
            "points",
            slack=settings.slack,
            note=note,
        ),
    ]
    for name in held_out:
        noun = _NOUNS[name]
        before, full, ru = (row_losses(arms, arm, name) for arm in (BEFORE, FULL, RU))
        claims += [
            claim(
                f"Training everything costs loss on {noun}",
                full,
                before,
                "higher",
                "nats",
                among="rows",
            ),
            claim(
                f"RU alone costs less on {noun} than training everything",
                ru,
                full,
                "lower",
                "nats",
                among="rows",
                note=note,
            ),
        ]
        if name == MATH:
            claims.append(
                claim(
                    "Alignment by RU alone improves mathematics",
                    ru,
                    before,
                    "lower",
                    "nats",
                    among="rows",
                )
            )
    return claims
