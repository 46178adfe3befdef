"""SSAH: safety-critical units are found, frozen, trained alone, taken out or put back.

Li & Kim, arXiv 2410.10862, equation 1 and section 4. With x_j the activation that enters B at
channel j, unit j has the importance I_j = var(x_j) ||B_j||^2, on a safety and on a utility set.
Redundant units have the lowest I_S + I_U, safety-critical ones (SCU) the highest I_S - I_U of the
rest, utility-critical ones the lowest. What is left is complex. `ssah.classify` has an example.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

from ssah.attribution import attribute
from ssah.deltas import rewind
from ssah.groups import UnitGroups, classify
from ssah.interventions import Zero
from ssah.methods.drawing import random_like
from ssah.methods.frame import Aim, Method, Stage
from ssah.methods.inputs import Inputs, Need
from ssah.methods.outcomes import Changed, Edited, Trained
from ssah.settings import setting

_SCORED: tuple[Need, ...] = ("aligned", "safety", "utility")
_NORMALISED = (
    "Scores are normalised by module and ranked over the whole model, which measured best here."
)


@dataclass(frozen=True)
class _Grouped(Method):
    """What the methods below share: shares of the groups, the paper's of Llama-2-7B-Chat."""

    paper: ClassVar[str] = "Li & Kim, Superficial Safety Alignment Hypothesis, arXiv 2410.10862"
    needs: ClassVar[tuple[Need, ...]] = _SCORED
    departures: ClassVar[tuple[str, ...]] = (_NORMALISED,)
    against: ClassVar[str] = "As many random units of each module."

    scu: float = setting(0.013, "Share of safety-critical units.", min=0, max=1)
    ucu: float = setting(0.133, "Share of utility-critical units.", min=0, max=1)
    ru: float = setting(0.148, "Share of redundant units.", min=0, max=1)

    def groups(self, inputs: Inputs) -> UnitGroups:
        """The four groups of the aligned model; errors as of `ssah.attribute` and `classify`."""
        safety, utility = (attribute(inputs.model, loader) for loader in inputs.loaders)
        return classify(safety, utility, scu=self.scu, ucu=self.ucu, ru=self.ru)


@dataclass(frozen=True)
class Freezing(_Grouped):
    """Freeze the safety-critical units."""

    name: ClassVar[str] = "ssah-freezing"
    equation: ClassVar[str] = "I_j = var(x_j) ||B_j||^2; frozen: highest I_S - I_U, then CU by I_S"
    stage: ClassVar[Stage] = "during"
    published: ClassVar[str] = "ASR after Dolly 11.9 % -> 3.7 % (Llama-2-7B-Chat, 7.5 % frozen)."

    complex: float = setting(
        0.06, "Share of complex units, of all units, that are frozen too.", min=0, max=1
    )

    def _find(self, inputs: Inputs) -> Trained:
        groups = self.groups(inputs)
        # Complex units by I_S: they carry safety too, and utility as well.
        units = groups["scu"] | groups.top("cu", self.complex)
        return Trained(units, facts={"units": len(units)})


@dataclass(frozen=True)
class Budget(_Grouped):
    """Train redundant units alone."""

    name: ClassVar[str] = "ssah-budget"
    equation: ClassVar[str] = "I_j = var(x_j) ||B_j||^2; trained: lowest I_S + I_U"
    stage: ClassVar[Stage] = "during"
    published: ClassVar[str] = (
        "GSM8K 9.2 -> 13.4 with 20 % trained, 8.8 with everything trained (Llama-7B)."
    )

    ru: float = setting(0.2, "Share of redundant units, which train.", min=0, max=1)

    def _find(self, inputs: Inputs) -> Trained:
        # The rest is frozen, norms and embeddings too: the budget is all that may move.
        units = self.groups(inputs)["ru"]
        return Trained(units, alone=True, facts={"units": len(units)})


@dataclass(frozen=True)
class Ablation(_Grouped):
    """Take a group of units out."""

    name: ClassVar[str] = "ssah-ablation"
    equation: ClassVar[str] = "I_j = var(x_j) ||B_j||^2; B_j = 0 for the units of a group"
    stage: ClassVar[Stage] = "locate"
    aim: ClassVar[Aim] = "remove"
    published: ClassVar[str] = "Without SCU, ASR 10 % -> 66 %, utility 58.3 -> 56.9 (Llama-2)."

    group: Literal["scu", "ucu", "ru"] = setting("scu", "Which group is taken out.")

    def _find(self, inputs: Inputs) -> Changed:
        units = self.groups(inputs)[self.group]
        return Changed(
            (Zero(units),),
            lambda seed: (Zero(random_like(units, seed)),),
            facts={"units": len(units)},
        )


@dataclass(frozen=True)
class Rewinding(_Grouped):
    """Put safety-critical units back."""

    name: ClassVar[str] = "rewinding"
    paper: ClassVar[str] = f"{_Grouped.paper} (the units); Wei et al., arXiv 2402.05162 (rewinding)"
    equation: ClassVar[str] = "W_j = W_j of the aligned model for SCU, W_j of the tuned one else"
    stage: ClassVar[Stage] = "after"
    needs: ClassVar[tuple[Need, ...]] = (*_SCORED, "tuned")
    departures: ClassVar[tuple[str, ...]] = (
        _NORMALISED,
        "No paper rewinds these units: it is the trivial counterpart of freezing them.",
    )
    published: ClassVar[str] = "Nothing published; a method that freezes should do better."
    strength: ClassVar[str | None] = "scu"
    # The paper's share, and more: here few units kept no more refusals than random ones.
    strengths: ClassVar[tuple[float, ...]] = (0.013, 0.05, 0.2)

    def _find(self, inputs: Inputs) -> Edited:
        units = self.groups(inputs)["scu"]
        # Rows of V that several heads share are put back too, as freezing keeps them.
        put_back = partial(rewind, *inputs.before_and_after)
        return Edited(
            lambda out: put_back(units, out=out),
            lambda seed: lambda out: put_back(random_like(units, seed), out=out),
            facts={"units": len(units)},
        )
