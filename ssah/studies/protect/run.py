"""Fine-tune an aligned model by a method, and measure what it refuses before and after."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssah.methods import Method, describe, names, typed_method
from ssah.storage import RECORD, check_named, check_new
from ssah.studies.loading import Loading
from ssah.studies.paired_models import (
    INTACT,
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
from ssah.studies.unaligned import unaligned_settings
from ssah.units import family_of

if TYPE_CHECKING:
    from ssah.data import Row
    from ssah.studies.protect.settings import ProtectSets, ProtectSettings

KIND = "protect"
TASK = "task"  # name of the rows whose loss is that of the task
AFTERWARDS = "after"  # the stage of a method that edits what was trained
_STAGES = ("before", "during", AFTERWARDS)
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
    place = Path(out)
    asked = _Asked.read(loading, place, settings, sets, data)
    study, method = asked.study, asked.method
    dtype = study.load().dtype
    family_of(study.model)  # an unknown architecture is refused before anything is written
    pool = study.encoded("finetune", asked.task, settings.train_max_length)
    before = unaligned_settings(study, asked.needed.unaligned)
    models = PairedModels(study, asked.measured)
    needed = asked.needed.ready(study, models.evaluation)
    making = Making(study, method, needed, pool, dtype)
    with study.under_way(
        2 + asked.trains_plain + models.STEPS * len(asked.names), bf16=settings.bf16, **before
    ) as steps:
        found = {INTACT: models.intact()}
        training = {PLAIN: making.plain()} if asked.trains_plain else {}
        made = making.protected()
        # What is edited afterwards was trained plainly.
        training[PROTECTED] = made["training"] or training[PLAIN]
        for name in asked.names[1:]:
            found[name] = models.measure(name, partial(making.load, name))
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


def preview_protect(
    loading: Loading,
    out: str | os.PathLike[str],
    settings: ProtectSettings,
    sets: ProtectSets,
    *,
    data: str,
) -> dict[str, Any]:
    """What `run_protect` would do; all rows are read, and no model is loaded.

    Arguments and errors as of `run_protect`.

    Returns:
        ``model``, ``method``, ``rows`` (``trained`` and ``held_out``), ``updates`` of each training
        and how many ``trainings`` there are, ``models`` (names of those that are measured),
        ``requests`` and ``harmless`` (which each of these answers).
    """
    asked = _Asked.read(loading, Path(out), settings, sets, data)
    held_out = asked.measured.rows[TASK]
    return {
        "model": loading.name,
        "method": _described(asked.method),
        "rows": {"trained": len(asked.task), "held_out": len(held_out)},
        "updates": settings.steps(len(asked.task)),
        "trainings": asked.trains_plain + (asked.method.stage != AFTERWARDS),
        "models": asked.names,
        "requests": len(asked.measured.requests[: settings.asr]),
        "harmless": len(asked.measured.harmless[: settings.asr]),
    }


@dataclass(frozen=True)
class _Asked:
    """What the study is to do, with its rows: everything that is known before a model is loaded.

    Attributes:
        study: which has read them.
        method: that protects.
        task: rows to train on.
        needed: data of the method.
        measured: what models are measured on, the held-out rows of the task among it.
    """

    study: Study
    method: Method
    task: list[Row]
    needed: Needed
    measured: PairedRows

    @classmethod
    def read(
        cls,
        loading: Loading,
        place: Path,
        settings: ProtectSettings,
        sets: ProtectSets,
        data: str,
    ) -> _Asked:
        """Read the rows; errors as of `run_protect`."""
        method = _protecting(settings)
        run = check_named(place).with_name(f"{place.name}.run")
        _check_place(place, run)
        loading.check_on_one_device("a model that trains")
        study = Study(loading, run, KIND, settings, batch_size=settings.batch_size)
        task, held_out = _task(study, data, sets.task_eval)
        needed = Needed.read(study, method, sets)
        measured = PairedRows.read(study, sets, **{TASK: held_out})
        return cls(study, method, task, needed, measured)

    @property
    def trains_plain(self) -> bool:
        """Whether there is a fine-tune with nothing protected."""
        return self.method.stage == AFTERWARDS or self._beside

    @property
    def names(self) -> list[str]:
        """The models that are measured."""
        return [INTACT, *([PLAIN] if self._beside else []), PROTECTED]

    @property
    def _beside(self) -> bool:
        asked: bool = self.study.settings.compare_plain
        return asked


def _protecting(settings: ProtectSettings) -> Method:
    """The method of the settings.

    Raises:
        ValueError: it neither trains nor edits, or is not for keeping refusals; or as of
            `typed_method`.
        ImportError: it needs a package that is not installed.
    """
    method = typed_method(settings.method, settings.set)
    every = [describe(name) for name in names()]
    # Who asks for protection must not get a model without refusals: some attacks edit weights too.
    able = [each["name"] for each in every if each["stage"] in _STAGES and each["aim"] == "keep"]
    if method.name not in able:
        raise ValueError(
            f"method is {method.name!r}, which acts at the stage {method.stage!r} with the aim "
            f"{method.aim!r}; it must be one that trains or edits, to keep refusals: "
            f"{', '.join(able)}"
        )
    package = method.lacking_package()
    if package is not None:
        raise ImportError(f"method {method.name!r} needs {package}")
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
    held_out = rows[::_EVERY][:_MOST]
    # A prompt that is on both sides would make the loss of the task look better than it is.
    apart = {str(row["prompt"]) for row in held_out}
    trained = [row for row in rows if str(row["prompt"]) not in apart]
    if not trained:
        raise ValueError(
            f"data is {data!r} with {len(rows)} rows, of which none is left to train on when some "
            "are held out; it must have more, or --task-eval must give others"
        )
    return trained, held_out


def _described(method: Method) -> dict[str, Any]:
    about = describe(method.name)
    kept = ("name", "does", "paper", "stage", "departures")
    values = {each["name"]: getattr(method, each["name"]) for each in about["settings"]}
    return {**{key: about[key] for key in kept}, "settings": values}


def _result(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What was measured of each model, how the protected one differs, and what follows."""
    models = {name: model_summary(own) for name, own in found.items()}
    others = [name for name in found if name != PROTECTED]
    harm = damage(found[INTACT], found[PROTECTED])
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
    before, after = (models[name]["task_loss"] for name in (INTACT, PROTECTED))
    said = f"{harm['sentence']} The loss of the task went from {before:.3f} to {after:.3f} nats"
    if PLAIN not in apart:
        return f"{said}."
    asr = apart[PLAIN]["asr"]
    low, high = (100 * bound for bound in asr["interval"])
    return (
        f"{said} (unprotected: to {models[PLAIN]['task_loss']:.3f}); beside the unprotected "
        f"fine-tune the ASR is {100 * asr['value']:+.1f} points [{low:+.1f}, {high:+.1f}]."
    )
