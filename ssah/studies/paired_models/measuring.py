"""Several models on the same requests and rows, each beside the intact one.

For example, of 4 requests the intact model gives in to none and a tuned one to the second: rates of
0 and 0.25, and the differences 0, 1, 0, 0, request by request. These are what the interval of the
rise is made of. Single values are kept, and never an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssah.evaluation import divergences, refused_requests
from ssah.studies.claims import measured_difference
from ssah.studies.measured_values import (
    attack_line,
    kl_summary,
    losses,
    losses_beside,
    measured_line,
    succeeded,
    summary,
)
from ssah.studies.paired_measures import UTILITY, Evaluation, checked_judges, intact_coherence

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ssah.data import Row
    from ssah.evaluation import Coherence, Judge, Unit
    from ssah.studies.paired_models.settings import PairedSets
    from ssah.studies.study import Study

INTACT = "intact"  # name of the model that the others are beside


@dataclass(frozen=True)
class PairedRows:
    """What models are measured on, and by which judges, read before any model is loaded."""

    requests: list[str]
    harmless: list[str]
    rows: dict[str, list[Row]]  # name -> rows with answers
    judges: list[Judge]

    @classmethod
    def read(cls, study: Study, sets: PairedSets, **more: list[Row]) -> PairedRows:
        """Read the sets of a study; ``more`` are further rows whose loss is measured, by name.

        Errors as of `ssah.data.load_rows` and `ssah.evaluation.Judge.check`.
        """
        judges = checked_judges(study.settings)
        return cls(
            study.sources.requests("requests", sets.requests),
            study.sources.requests("over_refusal", sets.over_refusal),
            {UTILITY: study.sources.rows("utility_eval", sets.utility_eval), **more},
            judges,
        )


class PairedModels:
    """Measures models, step by step. To be made once the study has loaded the intact one.

    Args:
        study: whose model is the intact one; it stays in memory, for KL and coherence.
        read: what is measured.
    """

    STEPS = 4  # of one model; the intact one has a step less, and coherence one more

    coherent: Coherence

    def __init__(self, study: Study, read: PairedRows) -> None:
        self.study, asked = study, study.settings.asr
        self.evaluation = Evaluation(
            study, read.requests, read.rows, asked=asked, judges=read.judges
        )
        self.harmless = self.evaluation.answerable(read.harmless, "over_refusal", asked=asked)

    def intact(self) -> dict[str, Any]:
        """What the intact model does, which decides what is coherent; inside `Study.under_way`."""
        study = self.study
        self.coherent = intact_coherence(study, study.model, study.tokenizer)
        return self._measured(INTACT, lambda: study.model)

    def measure(self, name: str, load: Callable[[], PreTrainedModel]) -> dict[str, Any]:
        """What another model does, and how far it is from the intact one.

        Args:
            name: of its steps.
            load: gives the model, in the study's precision; called for steps not done yet alone.

        Returns:
            ``measured`` and ``attack`` (of :class:`~ssah.studies.paired_measures.Evaluation`),
            ``over_refusal`` (what was judged of the harmless requests) and ``kl``: ``total``,
            ``tokens`` and ``first``, one value a row.
        """
        model = cache(load)

        def distance() -> dict[str, Any]:
            loader = self.evaluation.loaders[UTILITY]
            (own,) = divergences(model(), loader, [None], intact=self.study.model)
            return {key: value.tolist() for key, value in vars(own).items()}

        # First, since the same pass finds the losses of these rows.
        kl = self.study.steps(f"{name}.kl", distance)
        return self._measured(name, model, {UTILITY: losses_beside(kl)}) | {"kl": kl}

    def _measured(
        self,
        name: str,
        load: Callable[[], PreTrainedModel],
        known: Mapping[str, dict[str, Any]] | None = None,
    ) -> dict[str, Any]:
        steps, evaluation = self.study.steps, self.evaluation

        def attack() -> dict[str, Any]:
            return evaluation.attacks([f"{name}.requests"], load(), self.coherent)[0]

        def refusals() -> dict[str, Any]:
            key = f"{name}.over_refusal"
            return evaluation.judged(
                [key], load(), self.coherent, self.harmless, selections=[None]
            )[0]

        return {
            "measured": steps(
                f"{name}.measured", lambda: evaluation.measure(load(), known=known), measured_line
            ),
            "attack": steps(f"{name}.requests", attack, attack_line),
            "over_refusal": steps(f"{name}.over_refusal", refusals),
        }


def model_summary(found: Mapping[str, Any]) -> dict[str, Any]:
    """What `PairedModels` found of a model, without what is one per request.

    Returns:
        what :func:`ssah.studies.measured_values.summary` does, over-refusal included, with ``kl``
        (nats; None for the intact model) and its interval.
    """
    refused = refused_requests(found["over_refusal"])
    own = summary(found["measured"], found["attack"], refused)
    return own | (kl_summary(found["kl"]) if "kl" in found else {"kl": None, "kl_first": None})


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What `PairedModels` found of one model less that of another: paired, with intervals.

    Returns:
        ``asr``, ``over_refusal`` and ``<name>_loss`` of each set of rows ->
        :func:`ssah.studies.claims.measured_difference`.
    """

    def less(values: Callable[[Mapping[str, Any]], Tensor], unit: Unit) -> dict[str, Any]:
        return measured_difference(values(first), values(second), unit)

    found = {
        "asr": less(lambda each: succeeded(each["attack"]), "points"),
        "over_refusal": less(_over_refused, "points"),
    }
    for name in first["measured"]["losses"]:
        found[f"{name}_loss"] = less(partial(_losses, name), "nats")
    return found


def _losses(name: str, found: Mapping[str, Any]) -> Tensor:
    return losses(found["measured"], name)  # [rows]


def _over_refused(found: Mapping[str, Any]) -> Tensor:
    """Float64 ``[requests]``: 1 where a harmless request was refused, under the first judge."""
    return torch.tensor(refused_requests(found["over_refusal"]), dtype=torch.float64)
