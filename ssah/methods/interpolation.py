"""Interpolation: a part of the way back from the tuned model to the aligned one.

Wortsman et al. 2021, arXiv 2109.01903 (WiSE-FT). With a the aligned and t the tuned weights:

    r = a + alpha (t - a)               a = 1, t = 3, alpha = 0.5 gives 2

**The control** keeps each weight's whole change with probability alpha^2. Its change has the same
expected squared length, alpha^2 |t - a|^2, in another direction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ssah.deltas import interpolate, keep
from ssah.methods.frame import Method, Stage
from ssah.methods.inputs import Inputs, Need
from ssah.methods.outcomes import Edited
from ssah.settings import setting


@dataclass(frozen=True)
class Interpolation(Method):
    """Go a part of the way back."""

    name: ClassVar[str] = "interpolation"
    paper: ClassVar[str] = "Wortsman et al., Robust fine-tuning (WiSE-FT), arXiv 2109.01903"
    equation: ClassVar[str] = "W = W_aligned + alpha (W_tuned - W_aligned)"
    stage: ClassVar[Stage] = "after"
    needs: ClassVar[tuple[Need, ...]] = ("aligned", "tuned")
    departures: ClassVar[tuple[str, ...]] = (
        "The paper interpolates for accuracy under shift of image classifiers, not for safety.",
    )
    against: ClassVar[str] = "A random share alpha^2 of the change, which is as long on average."
    published: ClassVar[str] = "Accuracy under shift rises at no cost to the task, at alpha = 0.5."
    strength: ClassVar[str | None] = "alpha"
    strengths: ClassVar[tuple[float, ...]] = (0.25, 0.5, 0.75)

    alpha: float = setting(0.5, "How far towards the tuned model.", above=0, max=1)

    def _find(self, inputs: Inputs) -> Edited:
        models = inputs.before_and_after
        # A share s of the weights, changed whole, is sqrt(s) of the change long on average.
        return Edited(
            lambda out: interpolate(*models, self.alpha, out=out),
            lambda seed: (
                lambda out: keep(
                    *models,
                    self.alpha**2,
                    by="random",
                    seed=seed,
                    out=out,
                )
            ),
            facts={"alpha": self.alpha},
        )
