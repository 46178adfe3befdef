"""What a run measures of the model's safety, before and after: kept in ``run.json``.

    "safety": {"asked": {...}, "before": {"refused": ...}, "after": {"refused": ...}}

``asked`` says what was asked and how it was judged. A run that goes on, or is given again once it
is finished, measures what is not there yet. Where something else is asked, it measures both anew:
it can, because each call begins with the weights from which the run began.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from ssah.distributed import Ranks
from ssah.storage import check_fields
from ssah.training.finetune.folder import RUN, write_run

SAFETY = "safety"


class SafetyMeasure(Protocol):
    """Measures the model of a plan as it is now, see `ssah.evaluation.Refusals`."""

    model: Any

    def describe(self) -> Mapping[str, Any]:
        """What is asked, as plain data."""

    def __call__(self) -> Mapping[str, Any]:
        """What was found, as plain data."""

    def line(self, measured: Any, /) -> str:
        """What was found, in a line."""


class SafetyRecord:
    """Both measurements of a run.

    Args:
        measure: of the model.
        folder: of the run.
        record: of the run, see `open_run`; it gets what is measured.
        ranks: all of which measure, as their model may need all of them; the first one's counts.

    Raises:
        ValueError: the record is damaged; the file is named.
    """

    def __init__(
        self, measure: SafetyMeasure, folder: Path, record: dict[str, Any], ranks: Ranks
    ) -> None:
        self.measure, self.folder, self.record = measure, folder, record
        self.ranks = ranks
        asked = json.loads(json.dumps(measure.describe()))  # as it is when it is read back
        kept = record.get(SAFETY, {"asked": None})
        check_fields(folder / RUN, kept, {"asked": (dict, type(None))})
        if kept["asked"] != asked:
            record[SAFETY] = {"asked": asked}

    def take(
        self, when: Literal["before", "after"], log: Callable[[dict[str, float]], None] | None
    ) -> None:
        """Measure, unless it is known, write it down at once, and say what was found.

        Args:
            when: whether the model was trained already.
            log: takes the rates and the margin, for trackers; None where there are none.
        """
        kept = self.record[SAFETY]
        if when not in kept:
            kept[when] = self.ranks.tell(dict(self.measure()))[0]
            write_run(self.folder, self.record, self.ranks)
        if self.ranks.rank == 0:
            print(f"{when} training: {self.measure.line(kept[when])}", file=sys.stderr)
        if log is not None:
            log(_numbers(kept[when]))


def _numbers(measured: Mapping[str, Any]) -> dict[str, float]:
    """What a tracker can draw: of a rate the rate alone, and nothing that is one per request."""
    flat = {k: v.get("rate") if isinstance(v, Mapping) else v for k, v in measured.items()}
    return {f"{SAFETY}_{key}": value for key, value in flat.items() if value is not None}
