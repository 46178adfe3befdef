"""``ssah study freeze``."""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass

from ssah.cli.running import Result, quiet_threads
from ssah.cli.shared import FastWeights, MeasuredSets, Model, Rows, RunFolder, SaveModel
from ssah.settings import setting
from ssah.studies.training import FreezeSettings

ORDER = 20


@dataclass(frozen=True)
class FreezeSets(MeasuredSets):
    """What the study reads."""

    finetune: str = setting(MISSING, "Rows of the benign task.", panel="Data")


def freeze(
    model: Model,
    sets: FreezeSets,
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
    from ssah.report.terminal import study_tables
    from ssah.studies.training import run_freeze

    record = run_freeze(
        weights.loading(model, rows),
        out,
        settings,
        **asdict(sets),
        save_model=save_model,  # no setting: the record is the same with and without it
    )
    return Result(record, tuple(study_tables(record, out)))
