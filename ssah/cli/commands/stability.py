"""``ssah stability``."""

from __future__ import annotations

from dataclasses import asdict

from ssah.cli.running import Result, quiet_threads
from ssah.cli.shared import FastWeights, Model, Rows, RunFolder, ScoredSets
from ssah.studies.stability import StabilitySettings

ORDER = 110


def stability(
    model: Model,
    sets: ScoredSets,
    out: RunFolder,
    settings: StabilitySettings,
    weights: FastWeights,
    rows: Rows,
) -> Result:
    """Measure how far the groups depend on the prompts that they were found with.

    Example: `ssah stability runs/aligned --safety builtin:safety --utility builtin:utility
    --sizes 8 16 32 --out runs/stability`

    Groups from two disjoint draws of as many prompts are compared, again and again. Each row runs
    through the model once. Needs twice the largest size of different prompts of both kinds, and 16
    bytes a unit and row of memory.
    """
    quiet_threads()
    from ssah.report.terminal import stability_tables
    from ssah.studies.stability import run_stability

    record = run_stability(weights.loading(model, rows), out, settings, **asdict(sets))
    return Result(record, tuple(stability_tables(record, out)))
