"""``ssah check``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ssah.cli.running import Result, quiet_threads
from ssah.cli.shared import FastWeights, Rows
from ssah.studies.check import CheckSets, CheckSettings

ORDER = 59

# Exit codes beside those of every command.
_DAMAGED, _UNDECIDED = 3, 4


def check(
    before: Annotated[
        str, typer.Argument(metavar="BEFORE", help="Folder, .gguf, hub id, or an update of one.")
    ],
    after: Annotated[
        str, typer.Argument(metavar="AFTER", help="Likewise; or an adapter of BEFORE.")
    ],
    *,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="DIR", help="Folder of the run; default: nothing is kept."
        ),
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(help="A rise of the ASR that is no damage, as a fraction.", min=0, max=1),
    ] = 0.0,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 4 where it is undecided.")
    ] = False,
    settings: CheckSettings,
    sets: CheckSets,
    weights: FastWeights,
    rows: Rows,
) -> Result:
    """Tell whether a fine-tune damaged what a model refuses, where, and what would undo it.

    Example: `ssah check smollm2 runs/tuned --requests harmful.txt --tolerance 0.05`

    The exit code is 3 if the model was damaged: if the 95 % interval of the rise of the ASR, paired
    over requests, is above `--tolerance`. It is 0 if none of it is. Where some of it is the check
    is undecided, which is 0 too, and 4 with `--strict`: more requests decide it.
    """
    quiet_threads()
    from ssah.report.terminal import check_tables
    from ssah.studies.check import run_check

    # `--tolerance` is no setting: a run that is finished says at once what another one means.
    record = run_check(
        weights.loading(before, rows), after, out, settings, sets, tolerance=tolerance
    )
    codes = {"damaged": _DAMAGED, "undecided": _UNDECIDED if strict else 0, "not damaged": 0}
    verdict = record["result"]["damage"]["verdict"]
    return Result(record, tuple(check_tables(record)), codes[verdict])
