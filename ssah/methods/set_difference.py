"""Weights that matter for safety and not for utility: removed, frozen, or put back.

Wei et al. 2024, arXiv 2402.05162, section 3. With L_e the loss of the response of example e:

    SNIP    I(W_ij) = mean over e of |W_ij dL_e/dW_ij|
    Wanda   I(W_ij) = |W_ij| ||x_j||, over tokens of responses
    S(p, q) = top q of the weights by I on safety, less the top p by I on utility

Example of one row: I on safety (5, 4, 1, 0) and on utility (9, 1, 1, 8). The top half for safety is
{0, 1}, that for utility {0, 3}, and what is left is {1}.

With units in the place of weights, a unit's score is the sum over its column of B.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

from torch import Tensor
from transformers import PreTrainedModel

from ssah.attribution import WeightAttribution, attribute_weights, set_difference
from ssah.choices import Per
from ssah.deltas import rewind
from ssah.interventions import Zero
from ssah.methods.drawing import Chosen, random_like
from ssah.methods.frame import Aim, Method, Stage
from ssah.methods.inputs import Inputs, Need
from ssah.methods.outcomes import Changed, Edited, Trained
from ssah.methods.ranking import highest
from ssah.selections import weights
from ssah.settings import setting
from ssah.units import UnitSet, find_modules

_SCORED: tuple[Need, ...] = ("aligned", "safety", "utility")


@dataclass(frozen=True)
class _SetDifference(Method):
    """What the methods below share: the choice of weights."""

    paper: ClassVar[str] = "Wei et al., Assessing the Brittleness of Safety, arXiv 2402.05162"
    stage: ClassVar[Stage] = "locate"
    needs: ClassVar[tuple[Need, ...]] = _SCORED
    departures: ClassVar[tuple[str, ...]] = (
        "The loss of an example is a sum over its response, as in the paper; the published code "
        "divides it by the number of tokens.",
        "Weights are ranked by row, as in the paper; the published code ranks each matrix whole.",
        "The level of units is ours: a unit's score is the sum over its column of B, ranked by "
        "module.",
    )
    against: ClassVar[str] = "As many random weights of each matrix, or units of each module."

    metric: Literal["snip", "wanda"] = setting("snip", "How a weight is scored.")
    safety_share: float = setting(0.02, "q: share of the highest on safety.", above=0, max=1)
    utility_share: float = setting(
        0.04, "p: share of the highest on utility, which are left out.", min=0, max=1
    )
    level: Literal["weights", "units"] = setting("weights", "What is chosen.")
    per: Per = setting("row", "Which weights are ranked together.")

    def chosen(self, inputs: Inputs) -> Chosen:
        """S(p, q); errors as of `attribute_weights` and `set_difference`.

        Raises:
            ValueError: nothing is left of it.
        """
        model = inputs.model
        safety, utility = (
            attribute_weights(model, loader, metric=self.metric) for loader in inputs.loaders
        )
        # Both are scored before anything is chosen, and so before anything is removed.
        found: Chosen
        if self.level == "units":
            found = highest(_of_units(model, safety), self.safety_share) - highest(
                _of_units(model, utility), self.utility_share
            )
        else:
            # It refuses scores of other weights, and of the same data twice.
            masks = set_difference(
                safety, utility, self.safety_share, self.utility_share, per=self.per
            )
            found = weights(model, masks)
        # Freezing or removing nothing would look like a method that does nothing.
        if not len(found):
            raise ValueError(
                f"safety_share is {self.safety_share} and utility_share {self.utility_share}, of "
                "which nothing is left; raise the first or lower the second"
            )
        return found


@dataclass(frozen=True)
class Removal(_SetDifference):
    """Remove weights that safety alone needs."""

    name: ClassVar[str] = "set-difference-removal"
    aim: ClassVar[Aim] = "remove"
    equation: ClassVar[str] = "W_ij = 0 for S(p, q) = top q by I_safety less top p by I_utility"
    published: ClassVar[str] = "ASR -> 0.91 with 0.78 % removed, accuracy .58 -> .56 (Llama-2-7B)."

    def _find(self, inputs: Inputs) -> Changed:
        found = self.chosen(inputs)
        return Changed(
            (Zero(found),), lambda seed: (Zero(random_like(found, seed)),), facts=_facts(found)
        )


@dataclass(frozen=True)
class WeightFreezing(_SetDifference):
    """Freeze weights that safety alone needs."""

    name: ClassVar[str] = "set-difference-freezing"
    equation: ClassVar[str] = (
        "W_ij is frozen for S(p, q) = top q by I_safety less top p by I_utility"
    )
    stage: ClassVar[Stage] = "during"
    published: ClassVar[str] = "Freezing does not stop fine-tuning on harmful examples."

    def _find(self, inputs: Inputs) -> Trained:
        found = self.chosen(inputs)
        return Trained(found, facts=_facts(found))


@dataclass(frozen=True)
class WeightRewinding(_SetDifference):
    """Put back weights of safety alone."""

    name: ClassVar[str] = "set-difference-rewinding"
    equation: ClassVar[str] = "W_ij = that of the aligned model for S(p, q), of the tuned one else"
    stage: ClassVar[Stage] = "after"
    needs: ClassVar[tuple[Need, ...]] = (*_SCORED, "tuned")
    departures: ClassVar[tuple[str, ...]] = (
        *_SetDifference.departures,
        "The paper says that these weights are frozen; its author's code puts them back.",
    )
    published: ClassVar[str] = "As freezing, whose figures the published code makes so."
    strength: ClassVar[str | None] = "safety_share"
    # The paper's best grid cell, and shares at which its freezing begins to be felt (19 to 48 %).
    strengths: ClassVar[tuple[float, ...]] = (0.02, 0.1, 0.4)

    def _find(self, inputs: Inputs) -> Edited:
        found = self.chosen(inputs)
        put_back = partial(rewind, *inputs.before_and_after)
        return Edited(
            lambda out: put_back(found, out=out),
            lambda seed: lambda out: put_back(random_like(found, seed), out=out),
            facts=_facts(found),
        )


def _of_units(model: PreTrainedModel, of: WeightAttribution) -> dict[str, Tensor]:
    """The score of each unit, the sum over its column of B: float64 ``[units]`` by module."""
    found: dict[str, Tensor] = {}
    for name, module in find_modules(model).items():
        own = module.output
        scores = of.scores[own.param]  # [out, in]; [experts, out, in]; of a Conv1D [in, out]
        scores = scores if own.expert is None else scores[own.expert]
        # Of shared values a column of B is still a unit's own, and their rows are not.
        found[name] = scores.double().sum(1 - own.dim)[own.index]
    return found


def _facts(found: Chosen) -> dict[str, int]:
    return {"units" if isinstance(found, UnitSet) else "weights": len(found)}
