"""RESTA: what alignment changed is added to a model that fine-tuning has harmed.

Bhardwaj et al. 2024, arXiv 2402.11746. With the safety vector V = W_aligned - W_base:

    W = W_tuned + gamma V               tuned 5, aligned 3, base 2, gamma 0.5 gives 5.5

**The control** adds the entries of each tensor's V in random places: the same numbers, and none
where alignment had put it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from ssah.deltas import Deltas, Out, finished
from ssah.methods.drawing import shuffled
from ssah.methods.frame import Method, Stage
from ssah.methods.inputs import Inputs, Need
from ssah.methods.outcomes import Edited
from ssah.settings import setting


@dataclass(frozen=True)
class RESTA(Method):
    """Add what alignment changed."""

    name: ClassVar[str] = "resta"
    paper: ClassVar[str] = "Bhardwaj et al., RESTA, arXiv 2402.11746"
    equation: ClassVar[str] = "W = W_tuned + gamma (W_aligned - W_base)"
    stage: ClassVar[Stage] = "after"
    needs: ClassVar[tuple[Need, ...]] = ("aligned", "base", "tuned")
    departures: ClassVar[tuple[str, ...]] = (
        "The safety vector is aligned less base; the paper takes a model that was made unsafe.",
        "Nothing of the vector is dropped; the paper also has a version with DARE.",
    )
    against: ClassVar[str] = "The same vector with the entries of each tensor in random places."
    published: ClassVar[str] = "Harm falls from 18.6 % to 5.1 % after LoRA, at little cost."
    strength: ClassVar[str | None] = "gamma"
    strengths: ClassVar[tuple[float, ...]] = (0.25, 0.5, 1.0)

    gamma: float = setting(0.5, "How strongly it is added.", above=0)

    def _find(self, inputs: Inputs) -> Edited:
        aligned, tuned = inputs.before_and_after

        def write(out: Out, seed: int | None) -> Path | dict[str, Tensor]:
            assert inputs.base is not None
            # The tuned model first: the result has its files and dtypes.
            deltas = Deltas(inputs.base, [tuned, aligned])
            edit = {"edit": self.name, "gamma": self.gamma, "control": seed}
            return finished(deltas, out, edit, lambda: lambda name: make(deltas, name, seed))

        def make(deltas: Deltas, name: str, seed: int | None) -> Tensor:
            b, (t, a) = deltas.read(name)
            if not deltas.in_float(name):
                return t  # counters and the like, which nothing has trained
            # In float64: both differences are small beside the weights.
            v = a.double() - b.double()
            if seed is not None:
                v = shuffled(v, seed, name)
            return (t.double() + self.gamma * v).to(t.dtype)

        return Edited(
            lambda out: write(out, None),
            lambda seed: lambda out: write(out, seed),
            facts={"gamma": self.gamma},
        )
