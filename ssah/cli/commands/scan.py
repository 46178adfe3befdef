"""``ssah scan``."""

from __future__ import annotations

from dataclasses import asdict

from ssah.cli.running import Result, quiet_threads
from ssah.cli.shared import FastWeights, MeasuredSets, Model, Rows, RunFolder
from ssah.studies.scan import ScanSettings

ORDER = 100


def scan(
    model: Model,
    sets: MeasuredSets,
    out: RunFolder,
    settings: ScanSettings,
    weights: FastWeights,
    rows: Rows,
) -> Result:
    """Measure what ablating growing shares of each group costs, and choose the shares.

    Example: `ssah scan runs/aligned --safety builtin:safety --utility builtin:utility
    --requests builtin:safety_eval --utility-eval builtin:utility_eval --out runs/scan`

    The groups with the shares chosen are saved to DIR/groups. An interrupted scan goes on when the
    same command is given again.
    """
    quiet_threads()
    from ssah.report.terminal import scan_tables
    from ssah.studies.scan import run_scan

    record = run_scan(weights.loading(model, rows), out, settings, **asdict(sets))
    return Result(record, tuple(scan_tables(record, out)))
