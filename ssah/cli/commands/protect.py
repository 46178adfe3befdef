"""``ssah protect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ssah.cli.running import Result, quiet_threads
from ssah.cli.shared import Data, FastWeights, Model, Rows
from ssah.studies.protect import ProtectSets, ProtectSettings

ORDER = 58


def protect(
    model: Model,
    data: Data,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="DIR", help="Folder for the new model; new or empty."),
    ],
    *,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done; only rows are read.")
    ] = False,
    settings: ProtectSettings,
    sets: ProtectSets,
    weights: FastWeights,
    rows: Rows,
) -> Result:
    """Fine-tune an aligned model by a method that protects it, and measure it before and after.

    Example: `ssah protect runs/aligned --data task.jsonl --compare-plain --out runs/protected`

    The default, `interpolation`, trains everything and then goes half way back to the weights
    before. It is trivial: in our measurements no choice of units has protected more than its
    control. `--compare-plain` shows what it does for your model.

    DIR is a model that `from_pretrained` reads. The measurements are in DIR.run: an interrupted
    command goes on when it is given again.
    """
    quiet_threads()
    from ssah.report.terminal import protect_preview, protect_tables
    from ssah.studies.protect import preview_protect, run_protect

    loading = weights.loading(model, rows)
    if dry_run:
        planned = preview_protect(loading, out, settings, sets, data=data)
        return Result(planned, (protect_preview(planned),))
    record = run_protect(loading, out, settings, sets, data=data)
    return Result(record, tuple(protect_tables(record, out)))
