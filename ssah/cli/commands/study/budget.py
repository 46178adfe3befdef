"""``ssah study budget``."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ssah.cli.running import Result, quiet_threads
from ssah.cli.shared import FastWeights, MeasuredSets, Model, Rows, RunFolder, SaveModel
from ssah.settings import setting
from ssah.studies.training import BudgetSettings

ORDER = 10


@dataclass(frozen=True)
class BudgetSets(MeasuredSets):
    """What the study reads."""

    math: str | None = setting(None, "Rows for the loss on mathematics.", panel="Data")


def budget(
    model: Model,
    sets: BudgetSets,
    out: RunFolder,
    *,
    save_model: SaveModel = False,
    settings: BudgetSettings,
    weights: FastWeights,
    rows: Rows,
) -> Result:
    """Align a model by training everything, and by training its redundant units alone.

    Example: `ssah study budget smollm2 --safety builtin:safety --utility builtin:utility
    --requests builtin:safety_eval --utility-eval builtin:utility_eval --save-model
    --out runs/budget`

    Half of every batch are refusals (`--safety`), half ordinary answers (`--utility`). Both arms
    end with the same loss on a fixed sample of the refusals. An interrupted study goes on when the
    same command is given again.
    """
    quiet_threads()
    from ssah.report.terminal import study_tables
    from ssah.studies.training import run_budget

    record = run_budget(
        weights.loading(model, rows),
        out,
        settings,
        **asdict(sets),
        save_model=save_model,  # no setting: the record is the same with and without it
    )
    return Result(record, tuple(study_tables(record, out)))
