"""What methods are given: checkpoints and rows, of which each method needs some."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ssah.data import Pair, check_preferences
from ssah.deltas import WeightsOf
from ssah.models import load_weights

Need: TypeAlias = Literal[
    "aligned",
    "base",
    "tuned",
    "safety",
    "utility",
    "tokenizer",
    "borderline",
    "harmful",
    "preferences",
]
# What each of them is, for people.
NEEDS: dict[Need, str] = {
    "aligned": "the aligned model",
    "base": "the model before alignment, which commands take as --unaligned",
    "tuned": "the aligned model after fine-tuning",
    "safety": "harmful requests with refusals",
    "utility": "ordinary instructions with answers",
    "tokenizer": "the model's tokenizer",
    "borderline": "harmless requests that look dangerous",
    "harmful": "your own harmful requests with harmful answers: the project has none",
    "preferences": "pairs of answers, of which one is preferred",
}

Loader: TypeAlias = Iterable[Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class Inputs:
    """Checkpoints and data for methods; what a method does not need may be missing.

    Few methods need harmful answers, and say so. These are the user's own: the project ships none.

    Args:
        aligned: the aligned model, as it is before fine-tuning. Methods that run it need it in
            memory; those that only compute with its weights take a folder too.
        base: the model before alignment: folder, hub id, model or state dict.
        tuned: the aligned model after fine-tuning, likewise. Methods that run it take no state
            dict, and load a folder or a hub id.
        safety: batches of harmful requests with refusals, of ``ssah.data.make_loader`` for one;
            the same ones in every iteration.
        utility: batches of ordinary instructions with answers, likewise.
        tokenizer: of the aligned model.
        borderline: requests that are harmless and look dangerous, ``builtin:overrefusal`` for one.
        harmful: batches of harmful requests with harmful answers, likewise.
        preferences: rows with ``prompt``, ``chosen`` and ``rejected``, of
            ``ssah.data.load_preferences`` for one.
    """

    aligned: WeightsOf | None = None
    base: WeightsOf | None = None
    tuned: WeightsOf | None = None
    safety: Loader | None = None
    utility: Loader | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    borderline: Sequence[str] | None = None
    harmful: Loader | None = None
    preferences: Sequence[Pair | Mapping[str, Any]] | None = None

    def check(self, name: str, needs: Iterable[Need]) -> None:
        """Refuse what lacks something.

        Raises:
            ValueError: what the method ``name`` needs is missing; all of it is named. Or a row of
                the preferences that it needs is none.
        """
        needs = tuple(needs)
        # All at once, so that nobody is told of one after the other.
        missing = [f"{need} ({NEEDS[need]})" for need in needs if getattr(self, need) is None]
        if missing:
            raise ValueError(
                f"inputs of {name!r} lack {' and '.join(missing)}; Inputs must have them"
            )
        if "preferences" in needs:
            check_preferences(self.preferences or ())  # now, before anything is computed

    @property
    def loaders(self) -> tuple[Loader, Loader]:
        """Those of safety and of utility, once `check` has passed."""
        assert self.safety is not None
        assert self.utility is not None
        return self.safety, self.utility

    @property
    def pairs(self) -> list[Pair]:
        """The preferences as turns, once `check` has passed."""
        assert self.preferences is not None
        return check_preferences(self.preferences)

    @property
    def before_and_after(self) -> tuple[WeightsOf, WeightsOf]:
        """The aligned and the tuned model, once `check` has passed."""
        assert self.aligned is not None
        assert self.tuned is not None
        return self.aligned, self.tuned

    @property
    def model(self) -> PreTrainedModel:
        """The aligned model, for methods that run it.

        Raises:
            TypeError: it is not in memory.
        """
        return _in_memory("aligned", self.aligned)

    @property
    def tuned_model(self) -> PreTrainedModel:
        """The tuned model, for methods that run it: that of a folder or hub id is loaded.

        Raises:
            TypeError: it is a state dict, which cannot run.
        """
        if isinstance(self.tuned, str | os.PathLike):
            return load_weights(os.fspath(self.tuned))
        return _in_memory("tuned", self.tuned)


def _in_memory(name: str, model: object) -> PreTrainedModel:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"{name} is {type(model).__name__}; it must be a transformers model in memory for a "
            "method that runs it: ssah.models.load_model"
        )
    return model
