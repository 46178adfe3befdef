"""The models of the study: the plain fine-tune, and the one that a method protects.

Each is a folder in the run's own until all is measured; the protected one is then moved to where
the user wants it, in one step.

    stage of the method    what is done
    before                 the aligned model is edited, then trained
    during                 the aligned model is trained as the method says
    after                  the aligned model is trained plainly, and the result is edited
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import ssah
from ssah.data import spread
from ssah.deltas import measure, put_weights
from ssah.methods import Edited, Inputs, Method, Procedure, Trained, TrainingSetup
from ssah.models import move, quiet
from ssah.storage import whole_folder
from ssah.studies.training.to_loss import Recipe, train

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ssah.data import Encoded
    from ssah.studies.protect.needs import Needed
    from ssah.studies.study import Study

PLAIN, PROTECTED = "plain", "protected"
_SAMPLE = 32  # rows whose loss is the training loss of the record


@dataclass(frozen=True)
class Making:
    """Makes the models of a study, which is under way.

    Attributes:
        study: whose base is trained.
        method: that protects.
        needed: data of the method.
        pool: encoded rows of the task.
        dtype: of the checkpoint, in which the protected model is written.
    """

    study: Study
    method: Method
    needed: Needed
    pool: Sequence[Encoded]
    dtype: torch.dtype

    def folder(self, name: str) -> Path:
        """Of a model, until the study has ended."""
        return self.study.out / "models" / name

    def load(self, name: str) -> PreTrainedModel:
        """A model that was made, as it is written, in the precision of the study."""
        model, _ = self.study.loading("float32", str(self.folder(name)))
        return move(move(model, self.dtype), getattr(torch, self.study.dtype))

    def plain(self) -> dict[str, Any]:
        """Fine-tune with nothing protected: a step, which leaves a model."""

        def compute() -> dict[str, Any]:
            model = self._aligned()
            training, tuned = self._trained(TrainingSetup(model, None, lambda: model), model)
            # Not rounded yet: an edit of a bfloat16 model would begin with changes that are gone.
            self._write(PLAIN, tuned, torch.float32)
            return training

        found: dict[str, Any] = self.study.steps("plain", compute, _line)
        return found

    def protected(self) -> dict[str, Any]:
        """Fine-tune as the method says: a step, which leaves a model.

        Returns:
            ``facts`` (of the method), ``training`` (as `plain`, or None where what it edits had
            been trained), ``exact`` (``"verified"`` where a part was frozen, else None), and
            ``change``: ``changed`` (a share of all parameters) and ``relative`` (||delta|| /
            ||aligned||).
        """
        compute: Callable[[], dict[str, Any]]
        compute = {"before": self._before, "during": self._during, "after": self._after}[
            self.method.stage
        ]
        found: dict[str, Any] = self.study.steps("protected", compute)
        return found

    def _before(self) -> dict[str, Any]:
        model = self._aligned()
        edited = self._edit(model, self.needed.inputs(self.study, model, None))
        training, tuned = self._trained(TrainingSetup(model, None, lambda: model), model)
        return self._finished(tuned, dict(edited.facts), training)

    def _during(self) -> dict[str, Any]:
        model = self._aligned()
        found = self.method.find(self.needed.inputs(self.study, model, None))
        assert isinstance(found, Trained | Procedure)
        setup = found.prepare(model, self.study.settings.seed)
        frozen = setup.plan is not None
        training, tuned = self._trained(setup, model)
        made = self._finished(tuned, dict(found.facts), training)
        if isinstance(found, Trained):
            # As both are stored: beyond the plan's own proof, of what a user loads.
            loading, folder = self.study.loading, str(self.folder(PROTECTED))
            before, after = loading("auto")[0], loading("auto", folder)[0]
            ssah.verify(after, before, found.selection, only=found.alone)
        return {**made, "exact": "verified" if frozen else None}

    def _after(self) -> dict[str, Any]:
        tuned, _ = self.study.loading("float32", str(self.folder(PLAIN)))
        edited = self._edit(tuned, self.needed.inputs(self.study, self._aligned(), tuned))
        return self._finished(tuned, dict(edited.facts), None)

    def _edit(self, model: PreTrainedModel, inputs: Inputs) -> Edited:
        """Edit ``model``, one of the inputs, in place."""
        edited = self.method.find(inputs)
        assert isinstance(edited, Edited)
        put_weights(model, edited.write())
        return edited

    def _aligned(self) -> PreTrainedModel:
        # Small updates of bfloat16 weights round to nothing: training and edits are in float32.
        return self.study.loading("float32")[0]

    def _trained(
        self, setup: TrainingSetup, model: PreTrainedModel
    ) -> tuple[dict[str, Any], PreTrainedModel]:
        study, settings = self.study, self.study.settings
        steps = settings.steps(len(self.pool))
        recipe = Recipe(settings.lr, settings.train_batch_size, study.bf16, settings.seed)
        with study.steps.part("updates", steps) as advance:
            found = train(
                setup,
                model,
                study.tokenizer,
                [self.pool],
                spread(self.pool, _SAMPLE),
                recipe,
                steps=steps,
                advance=advance,
            )
        return found, setup.finish()

    def _finished(
        self,
        model: PreTrainedModel,
        facts: dict[str, Any],
        training: dict[str, Any] | None,
    ) -> dict[str, Any]:
        """Write the protected model, and say how far it is from the aligned one."""
        self._write(PROTECTED, model, self.dtype)
        total = measure(self.study.loading("auto")[0], model).total
        return {
            "facts": facts,
            "training": training,
            "exact": None,
            "change": {
                "changed": total.changed / total.parameters,
                "relative": total.relative,
            },
        }

    def _write(self, name: str, model: PreTrainedModel, dtype: torch.dtype) -> None:
        folder = self.folder(name)
        # A call that was killed may have left it, without the step that says so.
        shutil.rmtree(folder, ignore_errors=True)
        with whole_folder(folder) as inside, quiet():
            move(model, dtype).save_pretrained(inside)
            self.study.tokenizer.save_pretrained(inside)

    def place(self, out: Path) -> None:
        """Move the protected model to ``out``, unless an earlier call did; remove the others."""
        if self.folder(PROTECTED).is_dir():
            out.parent.mkdir(parents=True, exist_ok=True)
            os.replace(self.folder(PROTECTED), out)
        shutil.rmtree(self.study.out / "models", ignore_errors=True)


def _line(found: dict[str, Any]) -> str:
    return f"{found['steps']} updates, training loss {found['loss']:.3f}"
