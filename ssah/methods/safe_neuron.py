"""SafeNeuron: preferences are trained while safety neurons are frozen, so that others learn them.

Wang et al. 2026, arXiv 2602.12158. With m and s^2 of what enters B at unit j on harmful requests
and on ordinary ones (`ssah.attribution.effect_sizes`, `mean_shifts`):

    effect size       d_j = (m_harmful - m_ordinary) / pooled s
    activation shift  m_harmful - m_ordinary
    safety neurons    in the top share of their module by the size of both

Example of a module with a share of one half: d = (3, -2, 1, 0) and shifts (0.1, -5, 4, 0). The
halves are {0, 1} and {1, 2}, and the safety neuron is 1. Preferences are trained with DPO.

**The control** trains the same preferences with as many random units of each module frozen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ssah.attribution import attribute, effect_sizes, mean_shifts
from ssah.choices import Tokens
from ssah.methods.frame import Method, Stage
from ssah.methods.inputs import Inputs, Need
from ssah.methods.outcomes import Edited
from ssah.methods.ranking import highest
from ssah.methods.trained_edits import trained_edit
from ssah.settings import setting
from ssah.training import UpdatePlan, freeze, train_on_preferences
from ssah.units import UnitSet


@dataclass(frozen=True)
class SafeNeuron(Method):
    """Train preferences beside safety units."""

    name: ClassVar[str] = "safe-neuron"
    paper: ClassVar[str] = "Wang et al., SafeNeuron, arXiv 2602.12158"
    equation: ClassVar[str] = "frozen during DPO: highest |m_harmful - m_ordinary|, also / pooled s"
    stage: ClassVar[Stage] = "before"
    needs: ClassVar[tuple[Need, ...]] = (
        "aligned", "safety", "utility", "tokenizer", "preferences",
    )  # fmt: skip
    packages: ClassVar[tuple[str, ...]] = ("trl",)
    departures: ClassVar[tuple[str, ...]] = (
        "We know the paper from summaries: how it joins both measures may differ.",
        "Means and deviations are over tokens; the paper has them over requests.",
        "Neurons are found once; the paper finds them again, and trains on, round by round.",
        "Share, updates and learning rate are ours.",
    )
    against: ClassVar[str] = "The same training with as many random units of each module frozen."
    published: ClassVar[str] = "Pruning safety neurons no longer undoes the refusals."

    share: float = setting(0.05, "Of a module's units, by each measure.", above=0, max=1)
    tokens: Tokens = setting("labels", "Over which tokens both are taken.")
    steps: int = setting(100, "Updates.", min=1)
    lr: float = setting(1e-5, "Learning rate.", above=0)
    batch_size: int = setting(8, "Pairs of an update.", min=1)
    beta: float = setting(0.1, "Of DPO.", above=0)
    max_length: int = setting(512, "The most tokens of prompt and answer.", min=2)
    seed: int = setting(0, "Of the order of pairs.", min=0)

    def units(self, inputs: Inputs) -> UnitSet:
        """The safety neurons; errors as of `ssah.attribute`."""
        safety, utility = (
            attribute(inputs.model, loader, metric="norm", tokens=self.tokens)
            for loader in inputs.loaders
        )
        by_size, by_shift = (
            highest({name: each.abs() for name, each in measured.items()}, self.share)
            for measured in (effect_sizes(safety, utility), mean_shifts(safety, utility))
        )
        return by_size & by_shift

    def _find(self, inputs: Inputs) -> Edited:
        units = self.units(inputs)
        if not len(units):
            raise ValueError(f"share is {self.share}, and no unit is in it by both; raise it")
        return trained_edit(inputs, units, freeze, lambda plan: self._train(plan, inputs))

    def _train(self, plan: UpdatePlan, inputs: Inputs) -> None:
        assert inputs.tokenizer is not None
        train_on_preferences(
            plan,
            inputs.tokenizer,
            inputs.pairs,
            steps=self.steps,
            lr=self.lr,
            batch_size=self.batch_size,
            beta=self.beta,
            max_length=self.max_length,
            seed=self.seed,
        )
