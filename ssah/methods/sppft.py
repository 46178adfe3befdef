"""SPPFT: layers in which harmful and ordinary requests part are frozen.

Li et al., ICLR 2025, arXiv 2408.17003. With h_l(n) and h_l(m) the hidden states of ordinary and of
harmful requests at the last token of the prompt, after layer l:

    gap_l = angle(h_l(n), h_l(m)) - angle(h_l(n), h_l(n'))      of mean cosines of pairs

It is flat in early layers, opens, and flattens again: between lie the safety layers. They are those
from the first layer with ``opens`` of the largest gap to the first one with ``flat`` of it. The
gaps (0.0, 0.1, 0.5, 0.8, 0.85), for example, have 10 % of the largest at 0.085 and 90 % at 0.765:
the safety layers are 1 to 3. Levels are taken, and not slopes, since a curve of few rows is rough.

**The control** freezes another run of as many layers, one that shares none where there is such.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

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
        "A rule on the size of the gap finds the layers; the paper reads the first range off the "
        "curve.",
        "The second step, which moves both ends by counting refusals of a scaled model, is left "
        "out: where its result is known, `first` and `last` take it.",
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

    def gap(self, inputs: Inputs) -> Tensor:
        """The curve, radians: float64 ``[layers]``. Errors as of `represent`."""
        harmful, ordinary = (represent(inputs.model, loader) for loader in inputs.loaders)
        return pair_cosines(ordinary, harmful).gap[0]

    def _find(self, inputs: Inputs) -> Trained:
        model = inputs.model
        if (self.first is None) != (self.last is None):
            raise ValueError(
                f"first is {self.first} and last is {self.last}; both must be given, or neither"
            )
        if self.opens > self.flat:
            raise ValueError(f"opens is {self.opens}; it must be at most flat, {self.flat}")
        facts: dict[str, object] = {}
        if self.first is None or self.last is None:
            curve = self.gap(inputs)
            facts["gap"] = curve.tolist()
            run = opening(curve, self.opens, self.flat)
        else:
            run = range(self.first, self.last + 1)
        n = len(layers_of(model))
        return Trained(
            layers(model, run),
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
