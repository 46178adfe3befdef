"""NeuroStrike: units by which a linear probe knows harmful requests are removed.

Wu et al., NDSS 2026, arXiv 2509.11864. With z_j the activation of unit j of an FFN at the last
token of the prompt, standardised over prompts:

    probe      p(harmful | z) = sigmoid(w . z + b), by logistic regression, an FFN at a time
    removed    the units of each FFN with the highest w_j

Example: unit 0 is active at harmful prompts alone, unit 1 at harmless ones alone, and unit 2 at
all. Their weights are about 1, -1 and 0, and the first one is removed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ssah.interventions import Zero
from ssah.methods.drawing import random_like
from ssah.methods.frame import Aim, Method, Stage
from ssah.methods.inputs import Inputs, Need
from ssah.methods.outcomes import Changed
from ssah.methods.ranking import highest
from ssah.representations import logistic_regression, unit_activations
from ssah.settings import setting
from ssah.units import UnitSet


@dataclass(frozen=True)
class NeuroStrike(Method):
    """Take out what a probe reads harm from."""

    name: ClassVar[str] = "neurostrike"
    paper: ClassVar[str] = "Wu et al., NeuroStrike, NDSS 2026, arXiv 2509.11864"
    equation: ClassVar[str] = "B_j = 0 for the highest w_j of p(harmful) = sigmoid(w . z + b)"
    stage: ClassVar[Stage] = "locate"
    aim: ClassVar[Aim] = "remove"
    needs: ClassVar[tuple[Need, ...]] = ("aligned", "safety", "utility")
    departures: ClassVar[tuple[str, ...]] = (
        "There is one probe for each FFN, of what enters down at the last token; the published "
        "code has one for gate and one for up, of the largest output over the prompt.",
        "As many units of each FFN are removed; the published code removes rows of gate and up "
        "whose weights are more than three standard deviations above the mean.",
        "Harmless prompts are those of the utility set, and routed experts are left alone.",
    )
    against: ClassVar[str] = "As many random units of each FFN."
    published: ClassVar[str] = (
        "High ASR without under 1 % of the neurons, on more than 20 models and on models tuned "
        "from them."
    )

    share: float = setting(0.005, "Share of the units of each FFN that is removed.", above=0, max=1)
    penalty: float = setting(
        1.0, "Of the probe's squared weights, beside the sum of losses.", above=0
    )

    def units(self, inputs: Inputs) -> UnitSet:
        """The units; errors as of `unit_activations`.

        Raises:
            ValueError: they are none.
        """
        harmful, ordinary = (unit_activations(inputs.model, each) for each in inputs.loaders)
        scores = {
            name: logistic_regression(harmful[name], ordinary[name], penalty=self.penalty)
            for name in harmful
        }
        found = highest(scores, self.share)
        # Removing nothing would look like a method that does nothing.
        if not len(found):
            raise ValueError(f"share is {self.share}, which is no unit of any FFN; raise it")
        return found

    def _find(self, inputs: Inputs) -> Changed:
        units = self.units(inputs)
        return Changed(
            (Zero(units),),
            lambda seed: (Zero(random_like(units, seed)),),
            facts={"units": len(units)},
        )
