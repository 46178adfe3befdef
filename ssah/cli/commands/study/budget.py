"""``ssah study budget``."""

from __future__ import annotations

from typing import Annotated

import typer

from ssah.cli.running import Result, quiet_threads
from ssah.cli.shared import (
    FastWeights,
    Model,
    Requests,
    Rows,
    RunFolder,
    Safety,
    SaveModel,
    Utility,
    UtilityEval,
)
from ssah.studies.training.settings import BudgetSettings

ORDER = 10


def budget(
    model: Model,
    safety: Safety,
    utility: Utility,
    requests: Requests,
    utility_eval: UtilityEval,
    out: RunFolder,
    *,
    math: Annotated[
        str | None,
        typer.Option("--math", help="Rows for the loss on mathematics.", rich_help_panel="Data"),
    ] = None,
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
    from ssah.report.terminal.experiments import study_tables
    from ssah.studies.training.budget import budget as run

    record = run(
        weights.loading(model, rows),
        out,
        settings,
        safety=safety,
        utility=utility,
        requests=requests,
        utility_eval=utility_eval,
        math=math,
        save_model=save_model,
    )
    return Result(record, tuple(study_tables(record, out)))
