"""The models of a comparison: how each is made, trained and measured."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssah.deltas import put_weights
from ssah.methods import Changed, Edited, Inputs, Outcome, TrainingSetup, planned
from ssah.studies.compare.measuring import (
    TASK,
    Made,
    calibrate,
    measure,
    measured_in_short,
    pass_seconds,
    peak_memory,
)
from ssah.studies.paired_measures import UTILITY, Evaluation
from ssah.studies.training.arms import Arm
from ssah.studies.training.comparison import MODELS, Comparison
from ssah.studies.unaligned import unaligned_settings
from ssah.training import freeze
from ssah.units import UnitSet, find_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ssah.data import Loader
    from ssah.selections import Selection
    from ssah.studies.compare.lineup import Entrant
    from ssah.studies.compare.sets import Sets
    from ssah.studies.compare.settings import CompareSettings
    from ssah.studies.loading import Loading

INTACT, NONE = "intact", "none"  # the aligned model, and the one that is fine-tuned as it is
_FINDING_DTYPE = "float32"  # of gradients and of differences of weights


class Comparing(Comparison):
    """A study that compares methods.

    Attributes:
        sets: what was read.
        found_by: batches of the rows that methods find something by: ``"safety"`` and the like.
        units: how many the model has.
        choosing: what is measured to choose a strength.
        unaligned_settings: the model before alignment and a hash of its weights, for the record.

    Args:
        loading, out: as of `Comparison`.
        settings: of the comparison.
        base_name: the model before alignment, as ``Loading`` takes it; None: there is none.
    """

    settings: CompareSettings
    sets: Sets
    found_by: dict[str, Loader]
    units: int
    unaligned_settings: dict[str, str]

    def __init__(
        self, loading: Loading, out: Path, settings: CompareSettings, base_name: str | None
    ) -> None:
        super().__init__(loading, out, "compare", settings, keep=False)
        self.base_name = base_name

    def prepare(self, sets: Sets) -> None:
        """Load the model, and encode what is trained on, measured and found by.

        Errors as of `read`; a row or a request is too long.
        """
        trained, choosing, reported = sets.task
        held_out = {UTILITY: sets.utility_eval, TASK: reported}
        self.read({"finetune": trained}, sets.requests, held_out)
        # Now: a run of which every step is done loads no model again.
        self.units = sum(module.n_units for module in find_modules(self.model).values())
        self.choosing = Evaluation(
            self,
            sets.calibration,
            {**held_out, TASK: choosing},
            judges=self.measured.judges,
            name="calibration",
        )
        # All of it now: what is too long would be refused hours later, or be the row of a method.
        asked: dict[str, Any] = {
            role: self.measured.answerable(own, role)
            for role in ("over_refusal", "borderline")
            if (own := getattr(sets, role)) is not None
        }
        self.sets = replace(sets, **asked)
        self.found_by = {
            role: self.loader(own)
            for role in ("safety", "utility", "harmful")
            if (own := getattr(sets, role)) is not None
        }
        # Now: else a wrong one would be a row that says so, after the fine-tunes.
        self.unaligned_settings = unaligned_settings(self, self.base_name)

    # ------------------------------------------------------------------------- models

    @cached_property
    def aligned(self) -> PreTrainedModel:
        """The aligned model, for methods to find something in; it stays as it is."""
        if self.dtype == _FINDING_DTYPE:
            return self.coherent.model  # the same weights, which nothing changes either
        return self.base(_FINDING_DTYPE)[0]

    def inputs(self, entrant: Entrant, seed: int | None) -> Inputs:
        """What a method needs; ``seed`` is that of the fine-tuned model, where it needs one."""
        sets, needs = self.sets, entrant.method.needs
        other = partial(self.base, _FINDING_DTYPE)
        return Inputs(
            aligned=self.aligned,
            base=other(self.base_name)[0] if "base" in needs else None,
            tuned=other(str(self.tuned(seed)))[0] if "tuned" in needs else None,
            **self.found_by,
            tokenizer=self.tokenizer,
            borderline=sets.borderline,
            preferences=sets.preferences,
        )

    def tuned(self, seed: int | None) -> Path:
        """The folder of the model that was fine-tuned with nothing kept."""
        return self.out / MODELS / f"{NONE}-{seed}"

    def as_it_is(self, folder: Path | None = None) -> Made:
        """Makes the model of a folder; None: the aligned one."""

        @contextmanager
        def made() -> Iterator[tuple[PreTrainedModel, dict[str, Any]]]:
            yield self.base(self.dtype, None if folder is None else str(folder))[0], {}

        return made

    def running(self, found: Callable[[], Outcome], folder: Path | None) -> Made:
        """Makes the same with what was found changed as it runs."""

        @contextmanager
        def made() -> Iterator[tuple[PreTrainedModel, dict[str, Any]]]:
            change = found()
            assert isinstance(change, Changed)
            model = self.base(self.dtype, None if folder is None else str(folder))[0]
            ids = next(iter(self.measured.loaders[TASK]))["input_ids"]
            before, _ = pass_seconds(model, ids)
            with change.on(model):
                changed, _ = pass_seconds(model, ids)
                yield model, {"seconds_per_token_ratio": changed / before}

        return made

    def edited(self, found: Callable[[], Outcome], folder: Path | None) -> Made:
        """Makes the same with the weights that were found."""

        @contextmanager
        def made() -> Iterator[tuple[PreTrainedModel, dict[str, Any]]]:
            edit = found()
            assert isinstance(edit, Edited)
            model = self.base(self.dtype, None if folder is None else str(folder))[0]
            yield model, apply(edit, model)

        return made

    # ---------------------------------------------------------------------- measuring

    def measure(self, key: str, made: Made) -> dict[str, Any]:
        """Measure a model: a step, and its answers are steps too."""
        return self.measure_without([key], lambda: [None], made)[0]

    def measure_without(
        self,
        keys: Sequence[str],
        selections: Callable[[], Sequence[UnitSet | Selection | None]],
        made: Made,
    ) -> list[dict[str, Any]]:
        """Measure a model without each of several parts, in the same batches: a step each.

        Args:
            keys: of the parts.
            selections: gives the parts, where a step is still to be done.
            made: makes the model.
        """

        def compute(left: list[int]) -> list[dict[str, Any]]:
            every = selections()
            return measure(
                [keys[i] for i in left],
                made,
                self.measured,
                self.sets.over_refusal,
                self.coherent,
                selections=[every[i] for i in left],
            )

        names = [f"measure-{key}" for key in keys]
        return self.steps.together(names, compute, measured_in_short)

    def calibrate(self, key: str, made: Made) -> dict[str, float]:
        """Measure a model on what strengths are chosen by: a step."""
        found: dict[str, float] = self.steps(
            f"calibrate-{key}",
            lambda: calibrate(key, made, self.choosing, self.coherent),
            lambda found: f"ASR {found['asr']:.1%}, task {found['task_loss']:.3f}",
        )
        return found

    # ----------------------------------------------------------------------- training

    def fine_tune(
        self,
        name: str,
        seed: int,
        prepare: Callable[[PreTrainedModel, int], TrainingSetup],
        target: float | None,
        told: dict[str, Any] | None = None,
        *,
        keep: bool = False,
    ) -> dict[str, Any]:
        """Train in one way and measure it: two steps.

        Args:
            name: of the way.
            seed, target: as of `trained`.
            prepare, told: as `Arm` has them.
            keep: whether the model stays in its folder.

        Returns:
            ``training``, and what `measure` returns.
        """
        key, arm = f"{name}-{seed}", Arm(self.settings.lr, prepare, {} if told is None else told)
        training, folder = self.trained(key, seed, arm, target)
        found = self.measure(key, self.as_it_is(folder))
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
        return {"training": training, **found}

    def _train(
        self, key: str, seed: int, arm: Arm, target: float | None, folder: Path
    ) -> dict[str, Any]:
        with peak_memory() as peak:
            found = super()._train(key, seed, arm, target, folder)
            return {**found, "peak_memory_bytes": peak()}


def nothing_kept(model: PreTrainedModel, seed: int) -> TrainingSetup:
    """Everything trains, under a plan, so that all ways have one optimiser."""
    sizes = {name: module.n_units for name, module in find_modules(model).items()}
    return planned(freeze(model, UnitSet({}, sizes)))


def apply(edit: Edited, model: PreTrainedModel) -> dict[str, Any]:
    """Give a model the weights of an edit.

    Returns:
        ``apply_seconds``, and ``share``: the fraction of all parameters that are others now.
    """
    start = time.perf_counter()
    state = edit.write()
    seconds = time.perf_counter() - start
    return {"apply_seconds": seconds, "share": put_weights(model, state)}
