"""``ssah compare``: every method on one model, with common fine-tunes, controls and one measure."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssah.report.pictures import plot_pareto
from ssah.studies.compare.comparing import INTACT, NONE, Comparing, nothing_kept
from ssah.studies.compare.estimate import Estimate
from ssah.studies.compare.lineup import OPTIONS, Entrant, lineup
from ssah.studies.compare.planned import Planned, left, plan
from ssah.studies.compare.record import result_of
from ssah.studies.compare.rows import BySeed, Ran, run_row
from ssah.studies.compare.sets import read_sets
from ssah.studies.run_folder import OutOfTime

if TYPE_CHECKING:
    from ssah.studies.compare.settings import CompareSets, CompareSettings
    from ssah.studies.loading import Loading


def run_compare(
    loading: Loading,
    out: Path,
    settings: CompareSettings,
    sets: CompareSets,
    *,
    budget_minutes: float = math.inf,
) -> dict[str, Any]:
    """Compare methods on one aligned model, each beside a control of its size; resumable.

    Args:
        loading: of the aligned model.
        out: folder of the run.
        settings: of the comparison.
        sets: what it reads.
        budget_minutes: no step begins after so many, counted from the call.

    Returns:
        the record of the run; ``result`` has ``intact``, ``tuned``, ``rows`` and
        ``recommendation``.

    Raises:
        OutOfTime: the time was up. What is missing is named; the same call goes on.
        ValueError, OSError: wrong input; all of it is checked before anything is trained.
    """
    start = time.perf_counter()
    study, entrants, steps = _prepared(loading, out, settings, sets)
    # Beside the steps of the plan: precision, coherence, and a copy that is quick to load.
    with study.copies(len(steps) + 3, {}, **study.unaligned_settings) as taken:
        taken.run.deadline = start + 60 * budget_minutes
        try:
            result = _compared(study, entrants)
        except OutOfTime as error:
            raise OutOfTime(_missing(left(steps, taken.run), budget_minutes)) from error
    found = {"dtype": study.dtype, "units": study.units, **result}
    picture = plot_pareto(found, out / "pareto.png", f"{loading.name}: methods compared")
    return taken.run.finish(found, [picture])


def dry_run(
    loading: Loading, out: Path, settings: CompareSettings, sets: CompareSets
) -> dict[str, Any]:
    """What `run_compare` would do with the same arguments, and how long; nothing is written.

    Returns:
        ``methods`` (name -> why it does not run, or None), and what `Estimate.summary` has.
        Errors as of `run_compare`.
    """
    study, entrants, steps = _prepared(loading, out, settings, sets)
    found = Estimate(study, study.run(**study.unaligned_settings), steps).summary()
    return {"methods": {each.name: each.lacking for each in entrants}, **found}


def _prepared(
    loading: Loading, out: Path, settings: CompareSettings, sets: CompareSets
) -> tuple[Comparing, list[Entrant], list[Planned]]:
    """Check, read and load everything; nothing is written."""
    given = [need for need in OPTIONS if getattr(sets, need) is not None]
    entrants = lineup(settings.methods, given, settings.set)
    study = Comparing(loading, out, settings, sets.base)
    study.prepare(read_sets(study.sources, sets, settings))
    return study, entrants, plan(entrants, settings.seeds)


def _compared(study: Comparing, entrants: Sequence[Entrant]) -> dict[str, Any]:
    settings = study.settings
    intact = study.measure(INTACT, study.as_it_is())
    edits = [each for each in entrants if each.lacking is None and "tuned" in each.method.needs]
    # Once a seed, for everything that edits afterwards; they stay until the last of these is done.
    tuned: BySeed = {
        seed: study.fine_tune(NONE, seed, nothing_kept, settings.target_loss, keep=bool(edits))
        for seed in settings.seeds
    }
    targets = {seed: settings.target_loss or own["training"]["loss"] for seed, own in tuned.items()}
    ran: list[Ran | Entrant] = []
    for each in entrants:
        ran.append(each if each.lacking is not None else run_row(study, each, targets))
        if edits and each is edits[-1]:
            for seed in settings.seeds:
                shutil.rmtree(study.tuned(seed), ignore_errors=True)
    return result_of(intact, tuned, ran)


def _missing(steps: Sequence[Planned], minutes: float) -> str:
    methods = list(dict.fromkeys(step.method for step in steps))
    return (
        f"the {minutes:g} minutes are up, and {len(steps)} steps are left, for "
        f"{', '.join(methods)}: the same command goes on"
    )
