"""RESTA: what alignment changed is added to a model that fine-tuning has harmed.

Bhardwaj et al. 2024, arXiv 2402.11746. With the safety vector V = W_aligned - W_base:

    W = W_tuned + gamma V               tuned 5, aligned 3, base 2, gamma 0.5 gives 5.5

With DARE (Yu et al. 2023, arXiv 2311.03099) each entry of V is dropped with probability p, and what
is left is divided by 1 - p: of V = 1 with p = 0.5 either nothing is added, or 0.5 * 2.

**The control** adds the entries of each tensor's V in random places: the same numbers, and none
where alignment had put it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ssah.deltas import Deltas, Draw
from ssah.methods.drawing import shuffled
from ssah.methods.editing import edited
from ssah.methods.frame import Method, Stage
from ssah.methods.inputs import Inputs, Need
from ssah.methods.outcomes import Edited
from ssah.settings import setting


@dataclass(frozen=True)
class RESTA(Method):
    """Add what alignment changed."""

    name: ClassVar[str] = "resta"
    paper: ClassVar[str] = "Bhardwaj et al., RESTA, arXiv 2402.11746"
    equation: ClassVar[str] = "W = W_tuned + gamma m (W_aligned - W_base) / (1 - drop)"
    stage: ClassVar[Stage] = "after"
    needs: ClassVar[tuple[Need, ...]] = ("aligned", "base", "tuned")
    departures: ClassVar[tuple[str, ...]] = (
        "The safety vector is aligned less base; the paper takes a model that was made unsafe.",
        "Nothing of the vector is dropped by default; with `drop` it is the version with DARE.",
    )
    against: ClassVar[str] = "The same vector with the entries of each tensor in random places."
    published: ClassVar[str] = "Harm falls from 18.6 % to 5.1 % after LoRA, at little cost."
    strength: ClassVar[str | None] = "gamma"
    strengths: ClassVar[tuple[float, ...]] = (0.25, 0.5, 1.0)

    gamma: float = setting(0.5, "How strongly it is added.", above=0)

    drop: float = setting(
        0.0,
        "Share of the vector that is dropped at random (DARE); the rest grows for it.",
        min=0,
        below=1,
    )
    seed: int = setting(0, "Of what is dropped.", min=0)

    def _find(self, inputs: Inputs) -> Edited:
        def make(deltas: Deltas, seed: int | None, name: str) -> Tensor:
            b, (t, a) = deltas.read(name)
            if not deltas.in_float(name):
                return t  # counters and the like, which nothing has trained
            # In float64: both differences are small beside the weights.
            v = a.double() - b.double()
            if self.drop:
                kept = Draw(1 - self.drop, self.seed, name, 0).mask(v.flatten()).view(v.shape)
                v = torch.where(kept, v / (1 - self.drop), 0.0)
            if seed is not None:
                v = shuffled(v, seed, name)
            return (t.double() + self.gamma * v).to(t.dtype)

        # The tuned model first: the result has its files and dtypes.
        return edited(
            self,
            inputs.base,
            [inputs.tuned, inputs.aligned],
            lambda deltas, seed: partial(make, deltas, seed),
        )
