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

from ssah.methods import planned
from ssah.report.pictures import plot_budget
from ssah.studies.loading import Loading
from ssah.studies.paired_measures import MATH, UTILITY
from ssah.studies.training.arms import Arm
from ssah.studies.training.comparison import Comparison
from ssah.studies.training.results import (
    BEFORE,
    Arms,
    arms_summary,
    asr_claim,
    loss_claim,
    missed,
)
from ssah.studies.training.settings import BudgetSettings
from ssah.training import freeze, train_only
from ssah.units import UnitSet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ssah.methods import TrainingSetup

KIND = "budget"
FULL, RU = "full", "ru"
ARMS = {BEFORE: "(before)", FULL: "everything", RU: "RU alone"}
_NOUNS = {UTILITY: "ordinary answers", MATH: "mathematics"}


def run_budget(
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
    study = Comparison(loading, out, KIND, settings, keep=save_model)
    rows = study.scored_rows(safety, utility)
    asked = study.sources.requests("requests", requests)
    held_out = {UTILITY: study.sources.rows("utility_eval", utility_eval)}
    if math is not None:
        held_out[MATH] = study.sources.rows("math", math)
    # Units are scored on the rows that are trained on.
    with study.training(scored=rows, trained=rows, requests=asked, held_out=held_out, arms=2):
        groups = study.groups(ru=settings.ru)

        # A plan that freezes nothing, so that both arms have the same optimiser.
        def everything(model: PreTrainedModel, seed: int) -> TrainingSetup:
            return planned(freeze(model, UnitSet({}, groups.sizes)))

        def redundant(model: PreTrainedModel, seed: int) -> TrainingSetup:
            return planned(train_only(model, groups["ru"]))

        ru_lr = settings.ru_lr or settings.lr
        arms = study.compare({FULL: Arm(settings.lr, everything), RU: Arm(ru_lr, redundant)})
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
    # A lower tax of an arm that learned less is no merit: its claims say so.
    seeds = ", ".join(str(seed) for _, seed in missed(arms, RU))
    note = f"RU alone did not reach the alignment loss (seed {seeds})." if seeds else ""
    slack = settings.slack
    reaches = f"RU alone reaches the ASR of training everything, to {100 * slack:g} points"
    claims = [
        asr_claim("Training everything lowers the ASR", arms, FULL, BEFORE, "lower"),
        asr_claim("Training RU alone lowers the ASR", arms, RU, BEFORE, "lower", note=note),
        asr_claim(reaches, arms, RU, FULL, "not higher", slack=slack, note=note),
    ]
    # The tax is in nats on the same rows, in which it shows long before an accuracy moves.
    for name in held_out:
        costs = f"Training everything costs loss on {_NOUNS[name]}"
        less = f"RU alone costs less on {_NOUNS[name]} than training everything"
        claims += [
            loss_claim(costs, arms, FULL, BEFORE, "higher", name),
            loss_claim(less, arms, RU, FULL, "lower", name, note=note),
        ]
        if name == MATH:
            improves = "Alignment by RU alone improves mathematics"
            claims.append(loss_claim(improves, arms, RU, BEFORE, "lower", name))
    return claims
