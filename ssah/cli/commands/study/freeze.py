"""``ssah study freeze``."""

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
from ssah.studies.training.settings import FreezeSettings

ORDER = 20


def freeze(
    model: Model,
    safety: Safety,
    utility: Utility,
    finetune: Annotated[
        str, typer.Option("--finetune", help="Rows of the benign task.", rich_help_panel="Data")
    ],
    requests: Requests,
    utility_eval: UtilityEval,
    out: RunFolder,
    *,
    save_model: SaveModel = False,
    settings: FreezeSettings,
    weights: FastWeights,
    rows: Rows,
) -> Result:
    """Fine-tune an aligned model on a benign task with different units frozen, to equal loss.

    Example: `ssah study freeze runs/aligned --safety builtin:safety --utility builtin:utility
    --finetune task.jsonl --requests builtin:safety_eval --utility-eval builtin:utility_eval
    --seeds 0 1 2 --out runs/freeze`

    Every arm trains until the loss of a fixed sample of the task is that of the arm that freezes
    nothing. An interrupted study goes on when the same command is given again.
    """
    quiet_threads()
    from ssah.report.terminal.experiments import study_tables
    from ssah.studies.training.freeze import freeze as run

    record = run(
        weights.loading(model, rows),
        out,
        settings,
        safety=safety,
        utility=utility,
        finetune=finetune,
        requests=requests,
        utility_eval=utility_eval,
        save_model=save_model,
    )
    return Result(record, tuple(study_tables(record, out)))
