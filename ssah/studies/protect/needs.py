"""What a method needs, from the options of the command: read before any model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ssah.methods import Inputs, Method

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ssah.data import Loader, Pair, Row
    from ssah.studies.paired_measures import Evaluation
    from ssah.studies.protect.settings import ProtectSets
    from ssah.studies.study import Study

_LOADERS = ("safety", "utility", "harmful")  # rows with answers, of which methods get batches
# What a method needs -> the option that gives it, where it has no default.
_OPTIONS = {
    "base": "unaligned",
    "borderline": "borderline",
    "harmful": "harmful",
    "preferences": "preferences",
}


@dataclass(frozen=True)
class Needed:
    """The data that one method needs.

    Attributes:
        rows: ``"safety"`` or the like -> rows with answers.
        batches: the same encoded, once the model's tokenizer is there.
        borderline: requests.
        preferences: pairs of answers.
        unaligned: name of the model before alignment.
    """

    rows: Mapping[str, list[Row]] = field(default_factory=dict)
    batches: Mapping[str, Loader] = field(default_factory=dict)
    borderline: list[str] | None = None
    preferences: list[Pair] | None = None
    unaligned: str | None = None

    @classmethod
    def read(cls, study: Study, method: Method, sets: ProtectSets) -> Needed:
        """Read what ``method`` needs, and nothing else.

        Raises:
            ValueError: it needs what was not given; all of it is named.
        """
        options = {need: _OPTIONS[need] for need in method.needed if need in _OPTIONS}
        missing = [f"--{option}" for option in options.values() if getattr(sets, option) is None]
        if missing:
            raise ValueError(
                f"method {method.name!r} needs {' and '.join(missing)}; it must be given: "
                f"`ssah methods {method.name}` says what it is"
            )
        sources, needs = study.sources, method.needed
        borderline = sets.borderline if "borderline" in needs else None
        preferences = sets.preferences if "preferences" in needs else None
        return cls(
            {role: sources.rows(role, getattr(sets, role)) for role in _LOADERS if role in needs},
            {},
            None if borderline is None else sources.requests("borderline", borderline),
            None if preferences is None else sources.preferences(preferences),
            sets.unaligned if "base" in needs else None,
        )

    def ready(self, study: Study, evaluation: Evaluation) -> Needed:
        """The same, encoded: what is too long is refused before anything is trained."""
        own = self.borderline
        return replace(
            self,
            batches={role: study.loader(rows) for role, rows in self.rows.items()},
            borderline=None if own is None else evaluation.answerable(own, "borderline"),
        )

    def inputs(
        self, study: Study, aligned: PreTrainedModel, tuned: PreTrainedModel | None
    ) -> Inputs:
        """For the method, with models in memory."""
        base = None if self.unaligned is None else study.loading("float32", self.unaligned)[0]
        return Inputs(
            aligned=aligned,
            base=base,
            tuned=tuned,
            **self.batches,
            tokenizer=study.tokenizer,
            borderline=self.borderline,
            preferences=self.preferences,
        )
