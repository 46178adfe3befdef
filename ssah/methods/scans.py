"""SCANS: requests that only look dangerous are steered away from refusals, harmful ones to them.

Cao et al., AAAI 2025, arXiv 2408.11491. With h_l what layer l puts out, e the last token of a
prompt, and s the last token of the prompt followed by "Sure":

    v_l  = mean of h_l(e) over harmful requests - mean over ordinary ones, at length 1
    t_l  = h_l(e) - h_l(s)                          what "Sure" does to a request
    r_l  = mean of t_l over harmful requests
    s(q) = mean over layers of cos(t_l(q), r_l)     how harmful a request q looks
    h_l <- h_l + alpha v_l  if s(q) >= T, else  h_l - alpha v_l       at e and all tokens after it

Example: v = (1, 0), alpha = 2 and T = 0.7. A request with s = 0.9 has h = (5, 3) moved to (7, 3),
and one with s = 0.4 has it moved to (3, 3).

**Layers.** The directions of some layers speak for refusals in the vocabulary, and these layers are
steered. A layer's score is the mean logit of the first tokens of refusals less that of ordinary
answers, over the spread of its logits; the run of layers with the largest sum is taken. The cosine
is over these layers and all after them.

**The threshold** is the one that tells half of the rows that are kept for it apart best, and what
it does on the other half is told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssah.data import Encoder
from ssah.deltas.subspaces import Subspace
from ssah.evaluation import prompts
from ssah.interventions import Add, PromptEnds, Prompts
from ssah.methods.batch_rows import first_tokens, prompt_tokens, split_batches, split_texts
from ssah.methods.drawing import random_subspace
from ssah.methods.frame import Aim, Method, Stage
from ssah.methods.inputs import Inputs, Need
from ssah.methods.outcomes import Changed
from ssah.representations import mean_difference, opening_shifts, represent, token_contrast
from ssah.settings import setting
from ssah.units import share_count

# How harmful prompts, as tokens, look to a model: [prompts].
Look = Callable[[nn.Module, Sequence[Sequence[int]]], Tensor]


@dataclass(frozen=True)
class SCANS(Method):
    """Steer by how harmful a request looks."""

    name: ClassVar[str] = "scans"
    paper: ClassVar[str] = "Cao et al., SCANS, AAAI 2025, arXiv 2408.11491"
    equation: ClassVar[str] = "h_l <- h_l + alpha v_l if mean cos(t_l(q), r_l) >= T, else h_l - ..."
    stage: ClassVar[Stage] = "inference"
    aim: ClassVar[Aim] = "relax"
    needs: ClassVar[tuple[Need, ...]] = (
        "aligned",
        "safety",
        "utility",
        "tokenizer",
        "borderline",
    )
    departures: ClassVar[tuple[str, ...]] = (
        "It acts against over-refusal, on the aligned model.",
        "The threshold is chosen on a calibration split; the published code has one for each test "
        "set.",
        "A score finds the layers; the paper reads the tokens of each layer.",
        "Ordinary requests are those of the utility set; the paper's are of TruthfulQA.",
    )
    against: ClassVar[str] = "Directions turned at random all together, with the same signs."
    published: ClassVar[str] = (
        "Over-refusal falls by about 25 points (XSTest, OKTest), harmful requests are still "
        "refused, and perplexity hardly moves."
    )
    strength: ClassVar[str | None] = "alpha"
    strengths: ClassVar[tuple[float, ...]] = (3.5, 10.0, 30.0)

    alpha: float = setting(
        3.5, "How far hidden states are moved; directions have length 1.", above=0
    )
    share: float = setting(0.3, "Share of the layers that are steered.", above=0, max=1)
    opening: str = setting("Sure", "What a request is followed by, to see what it does to it.")

    def _find(self, inputs: Inputs) -> Changed:
        model, tokenizer = inputs.model, inputs.tokenizer
        assert tokenizer is not None
        assert inputs.borderline is not None
        safety, utility = inputs.loaders
        anchors, *harmful = split_batches(safety, (0.5, 0.25, 0.25), "safety")
        harmless = split_texts(inputs.borderline, (0.5, 0.5), "borderline")
        ends = PromptEnds.of(prompts(tokenizer, ["a", "b"]))
        opening = Encoder(tokenizer).tokenize(self.opening)

        means = mean_difference(represent(model, anchors), represent(model, utility))
        directions = F.normalize(means[0], dim=-1)  # [layers, hidden]
        scores = token_contrast(model, directions, first_tokens(anchors), first_tokens(utility))
        run = best_run(scores, max(1, share_count(self.share, len(scores))))

        anchored = opening_shifts(model, tokenizer, prompt_tokens(anchors), opening)
        reference = anchored[:, run.start :].mean(0)  # [layers, hidden]

        # Of the model that runs: it may be another one than this.
        def look(own: nn.Module, requests: Sequence[Sequence[int]]) -> Tensor:
            shifts = opening_shifts(own, tokenizer, requests, opening)[:, run.start :]
            return F.cosine_similarity(shifts, reference, dim=-1).mean(1)

        looks = [
            (look(model, prompt_tokens(rows)), look(model, prompts(tokenizer, texts)))
            for rows, texts in zip(harmful, harmless, strict=True)
        ]
        threshold = best_threshold(*looks[0])
        signs = Signs(look, threshold, ends)

        def changes(vectors: Tensor) -> tuple[Add]:  # [layers of the run, hidden]
            return (Add(run, self.alpha * vectors, at=ends, rows=signs),)

        steered = directions[run.start : run.stop]
        facts: dict[str, Any] = {"layers": list(run), "threshold": threshold}
        facts["calibration"], facts["held_out"] = (told_apart(*own, threshold) for own in looks)
        return Changed(changes(steered), lambda seed: changes(turned(steered, seed)), facts=facts)


@dataclass(frozen=True, eq=False)
class Signs:
    """Which way prompts are steered; text without a prompt in it is left alone.

    Attributes:
        look: how harmful prompts look.
        threshold: from which on one is harmful.
        ends: where prompts end.
    """

    look: Look
    threshold: float
    ends: PromptEnds

    def __call__(self, given: Prompts) -> Tensor:
        """1 for harmful prompts, -1 for others, 0 where there is none; ``[rows]``."""
        requests = self.ends.prompts(given)
        asked = [row for row, ids in enumerate(requests) if ids]
        signs = torch.zeros(len(requests))
        if asked:
            looks = self.look(given.model, [requests[row] for row in asked])
            signs[asked] = torch.where(looks >= self.threshold, 1.0, -1.0)
        return signs


def turned(directions: Tensor, seed: int) -> Tensor:
    """Directions ``[n, hidden]`` turned at random: their lengths and angles stay, float64."""
    own = Subspace.spanned_by(directions.T)
    drawn = random_subspace(own.n, own.rank, seed, "directions")
    return directions @ own.basis @ drawn.basis.T


def best_run(scores: Tensor, n: int) -> range:
    """The n layers in a row with the largest sum of scores ``[layers]``."""
    start = int(scores.unfold(0, n, 1).sum(1).argmax())
    return range(start, start + n)


def best_threshold(harmful: Tensor, harmless: Tensor) -> float:
    """The look from which on most requests are what they are taken for.

    It is half way between two looks, the largest mean of both shares that are right.

    Args:
        harmful, harmless: looks, ``[rows]`` each.

    Raises:
        ValueError: all looks are the same.
    """
    values = torch.cat([harmful, harmless]).unique()  # ascending
    if len(values) < 2:
        raise ValueError(
            "all requests of safety and borderline look alike on the calibration split; they must "
            "differ for a threshold"
        )
    between = (values[1:] + values[:-1]) / 2
    right = (harmful[:, None] >= between).double().mean(0)
    right += (harmless[:, None] < between).double().mean(0)
    return float(between[right.argmax()])  # the lowest of equal ones: more count as harmful


def told_apart(harmful: Tensor, harmless: Tensor, threshold: float) -> dict[str, float]:
    """Which shares of looks ``[rows]`` the threshold takes for what they are, and of how many."""
    return {
        "harmful_right": float((harmful >= threshold).double().mean()),
        "harmless_right": float((harmless < threshold).double().mean()),
        "harmful": len(harmful),
        "harmless": len(harmless),
    }
