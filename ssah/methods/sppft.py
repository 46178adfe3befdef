"""SPPFT: layers in which harmful and ordinary requests part are frozen.

Li et al., ICLR 2025, arXiv 2408.17003. With h_l(n) and h_l(m) the hidden states of ordinary and of
harmful requests at the last token of the prompt, after layer l:

    gap_l = angle(h_l(n), h_l(m)) - angle(h_l(n), h_l(n'))      of mean cosines of pairs

It is flat in early layers, opens, and flattens again: between lie the safety layers. They are those
from the first layer with ``opens`` of the largest gap to the first one with ``flat`` of it. The
gaps (0.0, 0.1, 0.5, 0.8, 0.85), for example, have 10 % of the largest at 0.085 and 90 % at 0.765:
the safety layers are 1 to 3. Levels are taken, and not slopes, since a curve of few rows is rough.

A second step moves both ends. With the weights of layers i to j times alpha, let R(i, j) of some
harmless requests that look dangerous be refused. With alpha > 1 there are more the more of the
safety layers are scaled and the fewer others:

    j <- argmax R(i, j) over j near the last layer, then i <- argmax R(i, j) over i near the first

Example: of layers 1 to 3, R(1, 2) = 4, R(1, 3) = 7, R(1, 4) = 9 moves the last one to 4. Then R(0,
4) = 8 and R(2, 4) = 5 leave the first one where it is. With alpha < 1 it is argmin.

**The control** freezes another run of as many layers, one that shares none where there is such.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ssah.evaluation import answers, judge
from ssah.interventions import Scale, intervene
from ssah.methods.drawing import random_numbers
from ssah.methods.frame import Method, Stage
from ssah.methods.inputs import Inputs, Need
from ssah.methods.outcomes import Trained
from ssah.representations import layers_of, pair_cosines, represent
from ssah.selections import layers
from ssah.settings import setting


@dataclass(frozen=True)
class SPPFT(Method):
    """Freeze the layers where requests part."""

    name: ClassVar[str] = "sppft"
    paper: ClassVar[str] = "Li et al., Safety Layers in Aligned LLMs, ICLR 2025, arXiv 2408.17003"
    equation: ClassVar[str] = "gap_l = angle(n, m) - angle(n, n'); frozen: where it opens"
    stage: ClassVar[Stage] = "during"
    needs: ClassVar[tuple[Need, ...]] = ("aligned", "safety", "utility")
    departures: ClassVar[tuple[str, ...]] = (
        "The angle is that of the mean cosine over all pairs; the paper draws 500 pairs.",
        "A rule on the size of the gap finds the first range; the paper reads it off the curve.",
        "The second step is taken where `alpha` is given; the paper chooses alpha, in steps of "
        "0.05, so that counts of refusals differ.",
        "Norms are scaled too, and O, which the published code scales in another model.",
    )
    against: ClassVar[str] = "Another run of as many layers, disjoint where there is such."
    published: ClassVar[str] = (
        "Refusals after a benign fine-tune stay: harmful rate 9.6 % against 44.4 % (Llama-3-8B); "
        "other layers of the same number do not help."
    )

    opens: float = setting(
        0.1, "Gap of the first safety layer, as a share of the largest.", above=0, max=1
    )
    flat: float = setting(
        0.9, "Gap of the last safety layer, as a share of the largest.", above=0, max=1
    )
    first: int | None = setting(None, "First safety layer, where it is known.", min=0)
    last: int | None = setting(None, "Last safety layer, where it is known.", min=0)
    alpha: float | None = setting(
        None,
        "What weights are multiplied by in the second step (published: 1.1 to 1.2, or 0.8); None: "
        "it is left out. It needs `tokenizer` and `borderline`.",
        above=0,
    )
    reach: int = setting(2, "By how many layers the second step moves an end at most.", min=1)
    max_new_tokens: int = setting(16, "Of an answer in the second step.", min=1)
    judge: str = setting("wei2024", "Says in the second step what is no refusal.")

    @property
    def needed(self) -> tuple[Need, ...]:
        """As of `Method`: the second step asks requests."""
        return self.needs if self.alpha is None else (*self.needs, "tokenizer", "borderline")

    def gap(self, inputs: Inputs) -> Tensor:
        """The curve, radians: float64 ``[layers]``. Errors as of `represent`."""
        harmful, ordinary = (represent(inputs.model, loader) for loader in inputs.loaders)
        return pair_cosines(ordinary, harmful).gap[0]

    def refusals(self, inputs: Inputs, run: range) -> int:
        """How many borderline requests are refused with these layers scaled; errors as of `judge`.

        The model answers greedily, and its answers are forgotten.
        """
        assert inputs.tokenizer is not None
        assert inputs.borderline is not None
        assert self.alpha is not None
        model, requests = inputs.model, inputs.borderline
        with intervene(model, Scale(layers(model, run), self.alpha)):
            texts = answers(model, inputs.tokenizer, requests, max_new_tokens=self.max_new_tokens)
        return judge(self.judge)(requests, texts).count(False)

    def _moved(self, inputs: Inputs, run: range, n: int) -> tuple[range, dict[str, int]]:
        """The second step: the layers of ``n`` that it gives, and what it counted of which."""
        assert self.alpha is not None
        sign = 1 if self.alpha > 1 else -1
        counts: dict[range, int] = {}

        def score(tried: range) -> int:
            if tried not in counts:  # both ends try the range that is there between their moves
                counts[tried] = self.refusals(inputs, tried)
            return sign * counts[tried]

        run = with_best_ends(run, n, self.reach, score)
        return run, {f"{tried[0]}-{tried[-1]}": count for tried, count in counts.items()}

    def _find(self, inputs: Inputs) -> Trained:
        model = inputs.model
        if (self.first is None) != (self.last is None):
            raise ValueError(
                f"first is {self.first} and last is {self.last}; both must be given, or neither"
            )
        if self.opens > self.flat:
            raise ValueError(f"opens is {self.opens}; it must be at most flat, {self.flat}")
        if self.alpha == 1:
            raise ValueError("alpha is 1, which changes nothing; it must be above or below 1")
        facts: dict[str, object] = {}
        if self.first is None or self.last is None:
            curve = self.gap(inputs)
            facts["gap"] = curve.tolist()
            run = opening(curve, self.opens, self.flat)
        else:
            run = range(self.first, self.last + 1)
        n = len(layers_of(model))
        chosen = layers(model, run)  # refuses layers that the model lacks, before any is scaled
        if self.alpha is not None:
            run, facts["refused"] = self._moved(inputs, run, n)
            chosen = layers(model, run)
        return Trained(
            chosen,
            draw=lambda seed: layers(model, other_run(run, n, seed)),
            facts=facts | {"layers": list(run)},
        )


def opening(gap: Tensor, opens: float, flat: float) -> range:
    """The layers in which the gap ``[layers]`` goes from one share of its largest to another.

    Raises:
        ValueError: it is above 0 in no layer.
    """
    largest = gap.max()
    if not float(largest) > 0:
        raise ValueError(
            "the gap between safety and utility opens in no layer: the prompts of both sets must "
            "differ, or first and last must say which layers are meant"
        )
    first, last = (int((gap >= share * largest).int().argmax()) for share in (opens, flat))
    return range(first, last + 1)


def with_best_ends(run: range, n_layers: int, reach: int, score: Callable[[range], float]) -> range:
    """The run with its last layer, and then its first one, moved to where ``score`` is highest.

    Either moves by at most ``reach`` layers; of equal scores, the smallest move is taken.
    """
    first, last = run[0], run[-1]
    uppers = range(max(first, last - reach), min(n_layers - 1, last + reach) + 1)
    upper = max(uppers, key=lambda end: (score(range(first, end + 1)), -abs(end - last)))
    lowers = range(max(0, first - reach), min(upper, first + reach) + 1)
    lower = max(lowers, key=lambda end: (score(range(end, upper + 1)), -abs(end - first)))
    return range(lower, upper + 1)


def other_run(run: range, n_layers: int, seed: int) -> range:
    """Another run of as many layers of ``n_layers``.

    Raises:
        ValueError: there is none, as all layers are in ``run``.
    """
    others = [range(start, start + len(run)) for start in range(n_layers - len(run) + 1)]
    others.remove(run)  # of the same length, so that the shares of parameters are alike
    if not others:
        raise ValueError(
            f"all {n_layers} layers are safety layers, so that there is no other run of as many"
        )
    # Layers in common would give the control a part of the method's choice.
    apart = [each for each in others if not set(each) & set(run)] or others
    return apart[random_numbers(1, len(apart), seed)[0]]
