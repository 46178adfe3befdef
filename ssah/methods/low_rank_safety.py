"""Directions of the alignment: added once more before fine-tuning, or kept alone after it.

With V = W_aligned - W_base, of every matrix ``[out, in]`` in the layers:

    LoX        W = W_aligned + alpha U_k S_k V_k^T          of the SVD V = U S V^T
    Safe LoRA  D = W_tuned - W_aligned, C = V V^T / ||V||_F
               D <- C D where cos(C D, D) <= threshold

Sources: Perin et al., COLM 2025, arXiv 2506.15606 (LoX); Hsu et al., NeurIPS 2024, arXiv 2405.16833
(Safe LoRA). Example: V = [[2, 0], [0, 0]] has ||V||_F = 2 and C = [[2, 0], [0, 0]]. A change D =
[[1, 0], [1, 0]] has C D = [[2, 0], [0, 0]], and their cosine is 1 / sqrt 2 = 0.71.

**The controls** have the same singular values and random directions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ssah.deltas import Deltas
from ssah.methods.drawing import random_subspace
from ssah.methods.editing import edited, in_layers, is_turned
from ssah.methods.frame import Method, Stage
from ssah.methods.inputs import Inputs, Need
from ssah.methods.outcomes import Edited
from ssah.settings import setting

_MATRICES = (
    "Every matrix in the layers has its own; the embedding and the head stay, and so do experts "
    "that a model keeps in one tensor."
)


@dataclass(frozen=True)
class LoX(Method):
    """Add the alignment's main directions."""

    name: ClassVar[str] = "lox"
    paper: ClassVar[str] = "Perin et al., LoX, COLM 2025, arXiv 2506.15606"
    equation: ClassVar[str] = "W = W_aligned + alpha U_k S_k V_k^T of W_aligned - W_base"
    stage: ClassVar[Stage] = "before"
    needs: ClassVar[tuple[Need, ...]] = ("aligned", "base")
    departures: ClassVar[tuple[str, ...]] = (
        _MATRICES,
        "The defaults are ours: the paper chooses rank and strength for each model.",
    )
    against: ClassVar[str] = "The same singular values in random directions."
    published: ClassVar[str] = "ASR after benign and harmful fine-tuning falls by 11 to 54 points."

    rank: int = setting(6, "k: how many directions.", min=1)
    alpha: float = setting(1.25, "How strongly they are added.", above=0)

    def _find(self, inputs: Inputs) -> Edited:
        def make(deltas: Deltas, seed: int | None, name: str) -> Tensor:
            base, (aligned,) = deltas.read(name)
            if not in_layers(deltas, name):
                return aligned
            u, s, vh = torch.linalg.svd(aligned.double() - base.double(), full_matrices=False)
            k = min(self.rank, len(s))  # a small matrix has all of its directions added
            left, right = u[:, :k], vh[:k].T  # [out, k], [in, k]
            # Two seeds: of a square matrix both sides have one size, and would be one draw.
            if seed is not None:
                left = random_subspace(len(left), k, seed, f"{name}, outputs").basis
                right = random_subspace(len(right), k, seed, f"{name}, inputs").basis
            added = self.alpha * (left * s[:k]) @ right.T
            return (aligned.double() + added).to(aligned.dtype)

        return edited(
            self, inputs.base, [inputs.aligned], lambda deltas, seed: partial(make, deltas, seed)
        )


@dataclass(frozen=True)
class SafeLoRA(Method):
    """Project stray changes on the alignment."""

    name: ClassVar[str] = "safe-lora"
    paper: ClassVar[str] = "Hsu et al., Safe LoRA, NeurIPS 2024, arXiv 2405.16833"
    equation: ClassVar[str] = "D <- C D if cos(C D, D) <= threshold, C = V V^T / ||V||_F"
    stage: ClassVar[Stage] = "after"
    needs: ClassVar[tuple[Need, ...]] = ("aligned", "base", "tuned")
    departures: ClassVar[tuple[str, ...]] = (
        "D is the whole change of a matrix, so that it works without LoRA too.",
        _MATRICES,
    )
    against: ClassVar[str] = "C with random directions, for the same matrices."
    published: ClassVar[str] = "Keeps most of the safety at nearly the utility of the fine-tune."
    strength: ClassVar[str | None] = "threshold"
    strengths: ClassVar[tuple[float, ...]] = (0.25, 0.5, 0.75)

    threshold: float = setting(0.5, "Cosine up to which a matrix is projected.", min=-1, max=1)

    def _find(self, inputs: Inputs) -> Edited:
        def make(deltas: Deltas, seed: int | None, name: str) -> Tensor:
            base, (tuned, aligned) = deltas.read(name)
            if not in_layers(deltas, name):
                return tuned
            turned = is_turned(deltas, name)
            v, d = aligned.double() - base.double(), tuned.double() - aligned.double()
            v, d = (v.T, d.T) if turned else (v, d)  # [out, in]
            projected = _by_alignment(v, d)
            # A change of 0 is in every subspace, and a matrix that alignment left gives no C.
            if not bool(d.any()) or not bool(v.any()):
                return tuned
            if float(torch.cosine_similarity(projected.flatten(), d.flatten(), dim=0)) > (
                self.threshold
            ):
                return tuned
            # Which matrices are projected stays the method's: the control is of the directions.
            if seed is not None:
                turn = random_subspace(len(v), len(v), seed, name).basis  # [out, out]
                projected = _by_alignment(turn @ v, d)
            change = projected.T if turned else projected
            return (aligned.double() + change).to(tuned.dtype)

        # The tuned model first: the result has its files and dtypes.
        return edited(
            self,
            inputs.base,
            [inputs.tuned, inputs.aligned],
            lambda deltas, seed: partial(make, deltas, seed),
        )


def _by_alignment(v: Tensor, d: Tensor) -> Tensor:
    """C D for ``v`` and ``d`` ``[out, in]``; 0 where ``v`` is."""
    # From the right: C itself is [out, out], and is never needed.
    return v @ (v.T @ d) / v.norm().clamp(min=torch.finfo(v.dtype).tiny)
