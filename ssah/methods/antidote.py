"""Antidote: weights of a tuned model that harmful answers need are removed.

Huang et al. 2024, arXiv 2408.09600. With x_j the input j of a matrix over the tokens of harmful
answers, and a share alpha of each matrix:

    h_ij = |W_ij| ||x_j||               Wanda (Sun et al. 2024, arXiv 2306.11695)
    W_ij = 0                            for the share alpha with the highest h

Example: one output has the weights (3, -1, 2), and the norms of its inputs are (1, 4, 1). The
scores are (3, 4, 2), and a third of the weights is the second one.

What is removed is chosen after fine-tuning, so that it does not matter how that was done.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ssah.attribution import attribute_weights
from ssah.choices import Per
from ssah.deltas import Deltas, Maker, in_tensors
from ssah.methods.drawing import random_like
from ssah.methods.editing import edited
from ssah.methods.frame import Method, Stage
from ssah.methods.inputs import Inputs, Need
from ssah.methods.outcomes import Edited
from ssah.selections import Selection, weights
from ssah.settings import setting


@dataclass(frozen=True)
class Antidote(Method):
    """Remove what harmful answers need."""

    name: ClassVar[str] = "antidote"
    paper: ClassVar[str] = "Huang et al., Antidote, arXiv 2408.09600"
    equation: ClassVar[str] = "W_ij = 0 for the highest |W_ij| ||x_j|| on harmful answers"
    stage: ClassVar[Stage] = "after"
    needs: ClassVar[tuple[Need, ...]] = ("aligned", "tuned", "harmful")
    departures: ClassVar[tuple[str, ...]] = (
        "Norms are over the tokens of the answers, where the rows have answers.",
        "Weights are ranked by matrix; Wanda itself ranks them by row, which `per` chooses.",
        "What is removed is merged weights, with LoRA or without; the paper tunes with LoRA.",
    )
    against: ClassVar[str] = "As many random weights of each matrix are removed."
    published: ClassVar[str] = "Harm falls at little loss of the task, however the model was tuned."
    strength: ClassVar[str | None] = "share"
    # The published code removes 0.1; half and twice as much show which way to go.
    strengths: ClassVar[tuple[float, ...]] = (0.05, 0.1, 0.2)

    share: float = setting(0.1, "Share of the weights that is removed.", above=0, max=1)
    per: Per = setting("matrix", "Which weights are ranked together.")

    def _find(self, inputs: Inputs) -> Edited:
        model = inputs.tuned_model
        scores = attribute_weights(model, inputs.harmful, metric="wanda")
        found = weights(model, scores.top(self.share, self.per))

        def plan(deltas: Deltas, seed: int | None) -> Maker:
            removed = found if seed is None else random_like(found, seed)
            assert isinstance(removed, Selection)
            masks = in_tensors(deltas.tuned[0], removed)

            def make(name: str) -> Tensor:
                tuned = deltas.tuned[0].read(name)
                if name not in masks:
                    return tuned
                return torch.where(masks[name].to_mask(), torch.zeros_like(tuned), tuned)

            return make

        return edited(self, inputs.aligned, [inputs.tuned], plan, weights=len(found))
