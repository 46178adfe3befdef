"""A single neuron: the one unit without which refusals become least likely.

With a_j(t) what unit j puts into B at token t, and E the log-probability of the refusal,

    screen     E falls by about sum over t of a_j(t) dE/da_j(t)      of all units, in one pass
    measured   E - E without unit j                                  of the best by the screen

Example: three units whose fall is screened as 2, 1.5 and 0.1 nats. The first two are measured, at 1
and 3 nats, and the second one is taken.

The claim that one neuron may suffice: Kazemi et al. 2026, arXiv 2605.08513.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ssah.attribution import attribute
from ssah.evaluation import effects
from ssah.interventions import Zero
from ssah.methods.frame import Aim, Method, Stage
from ssah.methods.inputs import Inputs, Need
from ssah.methods.outcomes import Changed
from ssah.settings import setting
from ssah.units import UnitSet


@dataclass(frozen=True)
class SingleNeuron(Method):
    """Take out the unit that refuses most."""

    name: ClassVar[str] = "single-neuron"
    paper: ClassVar[str] = "Kazemi et al., A Single Neuron Is Sufficient, 2026, arXiv 2605.08513"
    equation: ClassVar[str] = "argmax_j of log p(refusal) - log p(refusal without unit j)"
    stage: ClassVar[Stage] = "locate"
    aim: ClassVar[Aim] = "remove"
    needs: ClassVar[tuple[Need, ...]] = ("aligned", "safety")
    departures: ClassVar[tuple[str, ...]] = (
        "We know the paper's abstract alone: how it finds its neurons, and how far it suppresses "
        "them, may differ.",
        "Its other direction, a neuron of harmful concepts that is amplified, is left out.",
        "Only the best units by a screen of first order are measured.",
    )
    against: ClassVar[str] = "A random unit of all modules."
    published: ClassVar[str] = (
        "Without one of their refusal neurons, seven models (1.7B to 70B) answer what they refused."
    )

    screened: int = setting(32, "How many units are measured.", min=1)

    def _find(self, inputs: Inputs) -> Changed:
        model = inputs.model
        assert inputs.safety is not None
        # All tokens count: a unit that is out is out everywhere. The loss is the response's alone.
        found = attribute(model, inputs.safety, metric="taylor", tokens="all")
        assert found.signed is not None
        names = list(found.signed)
        sizes = {name: len(found.signed[name]) for name in names}
        # Of the loss, which is -E: where that falls as a unit goes, E rises.
        falls = -torch.cat([found.signed[name] for name in names])  # [units]
        # The screen is wrong where a unit does much: so the best ones are measured.
        best = falls.argsort(descending=True, stable=True)[: self.screened].tolist()
        candidates = [_one(number, sizes) for number in best]
        measured = effects(model, inputs.safety, candidates).mean("log_prob")  # [candidates]
        chosen = candidates[int(measured.argmax())]
        ((name, unit),) = [(name, own.tolist()[0]) for name, own in chosen.items() if len(own)]
        return Changed(
            (Zero(chosen),),
            lambda seed: (Zero(UnitSet.random(1, sizes, seed)),),
            facts={"module": name, "unit": unit, "effect": float(measured.max())},
        )


def _one(number: int, sizes: dict[str, int]) -> UnitSet:
    """The unit with this number among those of all modules in turn."""
    mask = torch.zeros(sum(sizes.values()), dtype=torch.bool)
    mask[number] = True
    return UnitSet.of_mask(mask, sizes)
