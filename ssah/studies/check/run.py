"""Did a fine-tune damage safety, where does its change lie, and what would undo the damage?"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from ssah.compat import peft
from ssah.deltas import Deltas, measure, put_weights
from ssah.models import move, weights_hash
from ssah.studies.check.repairs import N_REPAIRS, Repair, repair_sentence, repairs
from ssah.studies.loading import Loading
from ssah.studies.paired_models import (
    INTACT,
    PairedModels,
    PairedRows,
    damage,
    differences,
    model_summary,
)
from ssah.studies.study import Study, grouped

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ssah.groups import UnitGroups
    from ssah.studies.check.settings import CheckSets, CheckSettings

KIND = "check"
AFTER = "after"


def run_check(
    loading: Loading,
    after: str,
    out: str | os.PathLike[str] | None,
    settings: CheckSettings,
    sets: CheckSets,
    *,
    tolerance: float = 0.0,
) -> dict[str, Any]:
    """Compare a model with what a fine-tune made of it, on the same requests; resumable.

    Args:
        loading: of the model before.
        after: the model after: as ``ssah.training.load_trained`` takes it, or the folder of an
            adapter of the model before.
        out: folder of the run; None: nothing is kept.
        settings: of the study.
        sets: what both are measured on, and what units are scored on.
        tolerance: a rise of the ASR that is no damage, a fraction in [0, 1).

    Returns:
        the record of the run; its ``result`` has ``damage``, ``models`` (``intact``, ``after`` and
        the repaired ones -> a summary), ``differences`` (of the model after, less the intact one),
        ``delta`` (see :func:`ssah.deltas.measure`), and ``repairs``.

    Raises:
        ValueError, OSError: wrong input; all of it is found before anything is generated.
        ModelError, LibraryError: a model cannot be loaded, or would be dealt to several devices.
    """
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance is {tolerance}; it must be at least 0 and below 1")
    loading.check_on_one_device("a model whose weights are compared")
    with tempfile.TemporaryDirectory() if out is None else nullcontext(out) as folder:
        return _Check(loading, after, folder, settings, sets).checked(tolerance)


class _Check(Study):
    """The study. Both models are loaded anew for what needs them exactly as they are stored."""

    settings: CheckSettings

    def __init__(
        self,
        loading: Loading,
        after: str,
        out: str | os.PathLike[str],
        settings: CheckSettings,
        sets: CheckSets,
    ) -> None:
        super().__init__(loading, out, KIND, settings, batch_size=settings.batch_size)
        self.after = after
        self.rows = self.scored_rows(sets.safety, sets.utility)
        self.read = PairedRows.read(self, sets)

    def checked(self, tolerance: float) -> dict[str, Any]:
        """The record, finished."""
        self.load()
        tuned = self._load_after("auto")
        Deltas(self.model, [tuned])  # refuses two models that are not of one shape
        after_weights = weights_hash(tuned)
        del tuned
        models = PairedModels(self, self.read)
        n = 2 + N_REPAIRS * self.settings.repairs
        # Precision, two scores, and the delta beside the models.
        with self.under_way(
            4 + models.STEPS * n, after=self.after, after_weights=after_weights
        ) as steps:
            groups = grouped(
                self.settings,
                self.scores(self.rows),
                scu=self.settings.scu,
                ucu=self.settings.ucu,
                ru=self.settings.ru,
            )
            found = {
                INTACT: models.intact(),
                AFTER: models.measure(AFTER, lambda: self._load_after(self.dtype)),
            }
            delta = steps("delta", lambda: self._delta(groups))
            tried = repairs(groups["scu"], self.settings) if self.settings.repairs else {}
            for name, repair in tried.items():
                found[name] = models.measure(name, lambda repair=repair: self._repaired(repair))  # type: ignore[misc]
            return steps.run.finish(
                {
                    "dtype": self.dtype,
                    "before": self.loading.name,
                    "after": self.after,
                    "damage": damage(found[INTACT], found[AFTER], tolerance),
                    "models": {name: model_summary(own) for name, own in found.items()},
                    "differences": differences(found[AFTER], found[INTACT]),
                    "delta": delta,
                    "repairs": {name: _given_back(name, tried, found) for name in tried},
                }
            )

    def _load_after(self, dtype: str) -> PreTrainedModel:
        return load_tuned(self.loading, self.after, dtype)

    def _delta(self, groups: UnitGroups) -> dict[str, Any]:
        before, after = self.loading("auto")[0], self._load_after("auto")
        found = measure(before, after, groups)
        return {"base": self.loading.name, "tuned": self.after, **found.to_dict()}

    def _repaired(self, repair: Repair) -> PreTrainedModel:
        before, after = self.loading("auto")[0], self._load_after("auto")
        put_weights(after, repair.make(before, after))
        return move(after, getattr(torch, self.dtype))


def load_tuned(loading: Loading, after: str, dtype: str) -> PreTrainedModel:
    """The model after a fine-tune of the one that ``loading`` loads: any model, or an adapter."""
    if not peft.is_adapter(after):
        return loading(dtype, after)[0]
    model: PreTrainedModel = peft.merged(loading("auto")[0], after)
    return model if dtype == "auto" else move(model, getattr(torch, dtype))


def _given_back(
    name: str, tried: Mapping[str, Repair], found: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """What a repair changed, beside the model after and beside its control."""
    repair = tried[name]
    changed = differences(found[name], found[AFTER])
    given: dict[str, Any] = {"label": repair.label, "differences": changed}
    if repair.control is not None:
        beside = differences(found[name], found[repair.control])
        given |= {
            "control": repair.control,
            "beside_control": beside,
            "sentence": repair_sentence(repair, changed, beside),
        }
    return given
