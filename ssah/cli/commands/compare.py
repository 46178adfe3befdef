"""``ssah compare``."""

from __future__ import annotations

import math
from typing import Annotated

import typer

from ssah.cli.running import INTERRUPTED, Result, quiet_threads
from ssah.cli.shared import FastWeights, Model, Rows, RunFolder
from ssah.studies.compare import CompareSets, CompareSettings

ORDER = 127


def compare(
    model: Model,
    sets: CompareSets,
    out: RunFolder,
    *,
    budget_minutes: Annotated[
        float,
        typer.Option(
            "--budget-minutes",
            help="Begin no step after so many minutes; default: no limit.",
            min=0,
            show_default=False,
        ),
    ] = math.inf,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, and how long it takes.")
    ] = False,
    settings: CompareSettings,
    weights: FastWeights,
    rows: Rows,
) -> Result:
    """Compare published methods on your model and task, each beside a control of its size.

    Example: `ssah compare runs/aligned --data task.jsonl --methods ssah-freezing
    --methods interpolation --out runs/compare`

    MODEL is aligned. It is fine-tuned with nothing kept, once a seed, and by every method. All
    training ends at the same training loss. An interrupted comparison goes on when the same command
    is given again.
    """
    quiet_threads()
    from ssah.report.terminal import compare_plan, compare_tables
    from ssah.studies import OutOfTime
    from ssah.studies import compare as study

    loading = weights.loading(model, rows)
    if dry_run:
        planned = study.dry_run(loading, out, settings, sets)
        return Result(planned, (compare_plan(planned),))
    try:
        record = study.run_compare(loading, out, settings, sets, budget_minutes=budget_minutes)
    except OutOfTime as error:
        typer.echo(f"stopped: {error}", err=True)
        raise typer.Exit(INTERRUPTED) from error
    return Result(record, tuple(compare_tables(record, out)))
