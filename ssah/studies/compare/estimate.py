"""How long the steps of a comparison take that are left.

Seconds of a step are the mean of those of the same kind that the folder has. Where it has none,
they are made of two passes that are measured now, one over a batch of rows of the task and one over
a single token of as many rows:

    train      updates x rows x tokens of a row x 3      an update is about three passes
    measure    tokens of all rows and requests, and the tokens of an answer, batch after batch
    calibrate  likewise
    find       3 passes over both sets that methods find by; some methods take many more

For example, 40 requests in batches of 16 are 3 batches. With 64 tokens an answer and 0.05 seconds a
token they take 3 x 64 x 0.05 = 9.6 seconds, and passes over the requests on top of that.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from ssah.studies.compare.measuring import TASK, pass_seconds
from ssah.studies.compare.planned import Kind, Planned, left
from ssah.studies.paired_measures import UTILITY, Evaluation

if TYPE_CHECKING:
    from ssah.data import Loader
    from ssah.studies.compare.comparing import Comparing
    from ssah.studies.run_folder import Run

_TRAINING = 3  # passes that an update counts as: one forward, and two of its cost backward


class Estimate:
    """Seconds of a step of each kind.

    Args:
        study: whose model is in memory, before its folder is opened.
        run: its folder.
        steps: of the comparison.
    """

    def __init__(self, study: Comparing, run: Run, steps: Sequence[Planned]) -> None:
        self.study, self.run, self.steps = study, run, steps

    def summary(self) -> dict[str, Any]:
        """What is left: ``steps``, ``left`` and ``fine_tunes`` (counts), ``answers`` (a count),
        ``minutes``, and ``measured``: the kinds whose seconds are those of steps that were done."""
        todo = left(self.steps, self.run)
        counts = Counter(step.kind for step in todo)
        sets = self.study.sets
        of_measure = len(sets.requests[: self.study.settings.asr]) + len(sets.over_refusal)
        answers = counts["measure"] * of_measure + counts["calibrate"] * len(sets.calibration)
        seconds = sum(n * self.seconds(kind) for kind, n in counts.items())
        return {
            "steps": len(self.steps),
            "left": [step.name for step in todo],
            "fine_tunes": counts["train"],
            "answers": answers,
            "minutes": seconds / 60,
            "measured": sorted(kind for kind in counts if self.done(kind)),
        }

    def done(self, kind: Kind) -> list[float]:
        """Seconds of the steps of a kind that the folder has."""
        found = (self.run.seconds(step.name) for step in self.steps if step.kind == kind)
        return [seconds for seconds in found if seconds is not None]

    def seconds(self, kind: Kind) -> float:
        """Of one step."""
        done = self.done(kind)
        return sum(done) / len(done) if done else self._computed(kind)

    def _computed(self, kind: Kind) -> float:
        study, settings = self.study, self.study.settings
        if kind == "train":
            rows = study.pools[0]
            length = sum(len(row["input_ids"]) for row in rows) / len(rows)
            updates = settings.steps(study.pools)
            return _TRAINING * self._token * updates * settings.batch_size * length
        if kind == "find":
            sets = (study.found_by["safety"], study.found_by["utility"])
            return _TRAINING * self._token * sum(map(_tokens, sets))
        measured = study.measured if kind == "measure" else study.choosing
        harmless = study.sets.over_refusal if kind == "measure" else []
        batches = math.ceil(len(measured.asked) / study.batch_size)
        batches += math.ceil(len(harmless) / study.batch_size)
        return batches * settings.max_new_tokens * self._step + self._token * _read(measured)

    @cached_property
    def _ids(self) -> torch.Tensor:
        """Tokens of a batch, ``[rows, tokens]``."""
        ids: torch.Tensor = next(iter(self.study.measured.loaders[TASK]))["input_ids"]
        return ids

    @cached_property
    def _token(self) -> float:
        """Seconds a token of a pass over whole rows."""
        seconds, tokens = pass_seconds(self.study.model, self._ids)
        return seconds / tokens

    @cached_property
    def _step(self) -> float:
        """Seconds of a pass over one token of each row, as answering has it."""
        whole = (self.study.batch_size, 1)
        return pass_seconds(self.study.model, self._ids, most=whole)[0]


def _read(evaluation: Evaluation) -> int:
    """Tokens of what is read for the losses, for the KL of two models, and for the margin."""
    losses = {name: _tokens(loader) for name, loader in evaluation.loaders.items()}
    return sum(losses.values()) + 2 * losses[UTILITY]


def _tokens(loader: Loader) -> int:
    return sum(batch["input_ids"].numel() for batch in loader)
