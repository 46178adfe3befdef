"""Fine-tune an aligned model by a method, and measure what it refuses before and after."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssah.methods import Method, describe, names, typed_method
from ssah.models import ModelError
from ssah.storage import RECORD, check_new
from ssah.studies.loading import Loading
from ssah.studies.paired_models import (
    PairedModels,
    PairedRows,
    damage,
    differences,
    model_summary,
)
from ssah.studies.protect.making import PLAIN, PROTECTED, Making
from ssah.studies.protect.needs import Needed
from ssah.studies.run_folder import read_run
from ssah.studies.study import Study
from ssah.units import family_of

if TYPE_CHECKING:
    from ssah.data import Row
    from ssah.studies.protect.settings import ProtectSets, ProtectSettings

KIND = "protect"
TASK = "task"  # name of the rows whose loss is that of the task
_STAGES = ("before", "during", "after")
_EVERY, _MOST = 10, 64  # rows of the task that are held out: every tenth, at most so many


def run_protect(
    loading: Loading,
    out: str | os.PathLike[str],
    settings: ProtectSettings,
    sets: ProtectSets,
    *,
    data: str,
) -> dict[str, Any]:
    """Fine-tune an aligned model by a method, and measure it before and after; resumable.

    Args:
        loading: of the aligned model.
        out: the folder of the new model, which appears whole or not at all; new or empty. The steps
            of the study and its record are in ``<out>.run`` beside it.
        settings: of the study.
        sets: what is measured by, and what the method needs.
        data: rows of the task, as ``ssah.data.load_rows`` takes them.

    Returns:
        the record of the run; its ``result`` has ``method``, ``models`` (``intact``, ``protected``
        and perhaps ``plain`` -> a summary), ``differences`` (of the protected model, less each
        other), ``training``, ``facts``, ``exact``, ``change``, ``damage`` and ``conclusion``.

    Raises:
        ValueError, OSError: wrong input; all of it is found before anything is trained.
        ModelError: the model cannot be loaded, or would be dealt to several devices.
        RuntimeError: what was to stay frozen moved.
    """
    method = _protecting(settings)
    place = Path(out)
    run = place.with_name(f"{place.name}.run")
    _check_place(place, run)
    if loading.device_map is not None:
        raise ModelError(
            f"device_map is {loading.device_map!r}: a model that trains must be on one device; "
            "leave --device-map out"
        )
    study = Study(loading, run, KIND, settings, batch_size=settings.batch_size)
    task, held_out = _task(study, data, sets.task_eval)
    needed = Needed.read(study, method, sets)
    read = PairedRows.read(study, sets)
    read.rows[TASK] = held_out
    dtype = study.load().dtype
    family_of(study.model)  # an unknown architecture is refused before anything is written
    pool = study.encoded("finetune", task, settings.train_max_length)
    models = PairedModels(study, read)
    making = Making(study, method, needed, pool, dtype)
    edits_tuned = method.stage == "after"
    plain = edits_tuned or settings.compare_plain
    measured = 2 + settings.compare_plain
    with study.under_way(2 + plain + models.STEPS * measured, bf16=settings.bf16) as steps:
        found = {"intact": models.intact()}
        training = {PLAIN: making.plain()} if plain else {}
        made = making.protected()
        training[PROTECTED] = training[PLAIN] if edits_tuned else made["training"]
        for name in ([PLAIN] if settings.compare_plain else []) + [PROTECTED]:
            found[name] = models.measure(name, lambda name=name: making.load(name))  # type: ignore[misc]
        record = steps.run.finish(
            {
                "dtype": study.dtype,
                "bf16": study.bf16,
                "method": _described(method),
                **_result(found),
                "training": training,
                **{key: made[key] for key in ("facts", "exact", "change")},
            }
        )
        making.place(place)
    return record


def _protecting(settings: ProtectSettings) -> Method:
    """The method of the settings.

    Raises:
        ValueError: it neither trains nor edits, or as of `typed_method`.
    """
    method = typed_method(settings.method, settings.set)
    if method.stage not in _STAGES:
        able = [name for name in names() if describe(name)["stage"] in _STAGES]
        raise ValueError(
            f"method is {method.name!r}, which acts at the stage {method.stage!r}; it must be one "
            f"that trains or edits: {', '.join(able)}"
        )
    return method


def _check_place(place: Path, run: Path) -> None:
    """Refuse a place that is taken, unless by the result of this run."""
    finished = (run / RECORD).is_file() and read_run(run)["finished"]
    placed = finished and not (run / "models" / PROTECTED).is_dir()
    if not placed:
        check_new(place)
    elif not place.is_dir():
        raise FileNotFoundError(
            f"out is {str(place)!r}, which is gone, and its run is finished: remove {str(run)!r} "
            "to make it anew, or give another folder"
        )


def _task(study: Study, data: str, task_eval: str | None) -> tuple[list[Row], list[Row]]:
    """Rows to train on, and rows whose loss is that of the task.

    Raises:
        ValueError: there are too few to hold some out.
    """
    rows = study.sources.rows("finetune", data)
    if task_eval is not None:
        return rows, study.sources.rows("task_eval", task_eval, measures=True)
    held_out = [*range(0, len(rows), _EVERY)][:_MOST]
    if len(rows) < 2:
        raise ValueError(
            f"data is {data!r} with {len(rows)} row; it must have at least 2, as some are "
            "held out, unless --task-eval gives others"
        )
    apart = set(held_out)
    return [row for i, row in enumerate(rows) if i not in apart], [rows[i] for i in held_out]


def _described(method: Method) -> dict[str, Any]:
    about = describe(method.name)
    kept = ("name", "does", "paper", "stage", "departures")
    values = {each["name"]: getattr(method, each["name"]) for each in about["settings"]}
    return {**{key: about[key] for key in kept}, "settings": values}


def _result(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What was measured of each model, how the protected one differs, and what follows."""
    models = {name: model_summary(own) for name, own in found.items()}
    others = [name for name in found if name != PROTECTED]
    harm = damage(found["intact"], found[PROTECTED])
    apart = {name: differences(found[PROTECTED], found[name]) for name in others}
    return {
        "models": models,
        "differences": apart,
        "damage": harm,
        "conclusion": _conclusion(models, apart, harm),
    }


def _conclusion(
    models: Mapping[str, Mapping[str, Any]],
    apart: Mapping[str, Mapping[str, Any]],
    harm: Mapping[str, Any],
) -> str:
    """What came of it, in a sentence or two."""
    before, after = (models[name]["task_loss"] for name in ("intact", PROTECTED))
    said = f"{harm['sentence']} The loss of the task went from {before:.3f} to {after:.3f} nats"
    if PLAIN not in apart:
        return f"{said}."
    asr = apart[PLAIN]["asr"]
    low, high = (100 * bound for bound in asr["interval"])
    return (
        f"{said} (unprotected: to {models[PLAIN]['task_loss']:.3f}); beside the unprotected "
        f"fine-tune the ASR is {100 * asr['value']:+.1f} points [{low:+.1f}, {high:+.1f}]."
    )
