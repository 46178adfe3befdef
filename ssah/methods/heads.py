"""Safety heads: attention heads without which the next token changes most.

Zhou et al., ICLR 2025, arXiv 2410.13708. A head is taken out in one of two ways:

    undifferentiated   its W_q is multiplied by eps: all scores are 0, and token i has the mean of
                       the values of tokens 1 to i                                          (eq. 7)
    scaled             its W_v is multiplied by eps: it puts out nothing                    (eq. 8)

Ships of a request q and a head h is KL(p(.|q) || p(.|q without h)) of the next token (eq. 9). Of a
set of requests it is the angle of left singular subspaces (eq. 11, `left_subspace`), and
Sahara takes out one head after the other by it (`greedily`).

Ships is one pass over all requests for each head, and Sahara one for each head and round. A model
of 30 layers with 9 heads each has 270 heads.

Example: values 2 and 4 at two tokens, of which the second one attends to itself alone and puts out
4. Undifferentiated it puts out 3, and scaled 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ssah.deltas.subspaces import Subspace, principal_angles
from ssah.evaluation import greedily, kl_divergence, left_subspace, next_token_log_probs
from ssah.interventions import WeightChange, Zero, intervene
from ssah.methods.drawing import random_numbers
from ssah.methods.frame import Aim, Method, Stage
from ssah.methods.inputs import Inputs, Need
from ssah.methods.outcomes import Changed
from ssah.selections import Selection, heads, units
from ssah.settings import setting
from ssah.units import UnitSet, find_heads, find_modules

Head: TypeAlias = tuple[int, int]  # number of the layer and of the query head in it
How: TypeAlias = Literal["undifferentiated", "scaled"]

_LIMIT = "eps is 0, the limit of the paper's 1e-5, so that norms of queries cannot undo it."


@dataclass(frozen=True)
class _Heads(Method):
    """What the methods below share."""

    paper: ClassVar[str] = "Zhou et al., Safety Attention Heads, ICLR 2025, arXiv 2410.13708"
    stage: ClassVar[Stage] = "locate"
    aim: ClassVar[Aim] = "remove"
    needs: ClassVar[tuple[Need, ...]] = ("aligned", "safety")
    against: ClassVar[str] = "As many random heads of all layers, taken out in the same way."


@dataclass(frozen=True)
class Ships(_Heads):
    """Take out the heads that change most."""

    name: ClassVar[str] = "ships"
    equation: ClassVar[str] = "Ships(q, h) = KL(p(.|q) || p(.|q without h)), mean over requests"
    departures: ClassVar[tuple[str, ...]] = (
        _LIMIT,
        "Heads are chosen for all requests, by their mean or by how many requests have them among "
        "their best; the paper takes out the best of each request as it is asked.",
        "Requests are in the template that the rows were made with; the paper uses none.",
    )
    published: ClassVar[str] = (
        "Without one head (0.006 % of the weights) ASR .04 -> .64 (Llama-2-7b-chat); "
        "undifferentiated far above scaled."
    )

    out: How = setting("undifferentiated", "How a head is taken out.")
    n_heads: int = setting(1, "How many heads are taken out.", min=1)
    by: Literal["mean", "votes"] = setting(
        "mean", "Heads of the largest mean, or those that most requests have among their best."
    )

    def effects(self, inputs: Inputs) -> dict[Head, Tensor]:
        """Ships of every head and request, nats: float64 ``[rows]`` each.

        Errors as of `next_token_log_probs`.
        """
        model = inputs.model
        assert inputs.safety is not None
        intact = next_token_log_probs(model, inputs.safety)  # [rows, vocabulary]
        found = {}
        for head in every_head(model):
            with intervene(model, _without(model, [head], self.out)):
                other = next_token_log_probs(model, inputs.safety)
            found[head] = kl_divergence(intact, other)
        return found

    def _find(self, inputs: Inputs) -> Changed:
        model = inputs.model
        _check_number(self.n_heads, "n_heads", model)
        effects = self.effects(inputs)
        every = list(effects)
        table = torch.stack(list(effects.values()))  # [heads, rows]
        mean = table.mean(1)
        score = mean
        if self.by == "votes":
            # Stable: of equal heads a request votes for the earlier one.
            order = table.argsort(stable=True, dim=0, descending=True)[: self.n_heads]
            score = torch.bincount(order.flatten(), minlength=len(every)).double()
        best = score.argsort(descending=True, stable=True)[: self.n_heads].tolist()
        return _outcome(model, [every[n] for n in best], self.out, mean[best].tolist())


@dataclass(frozen=True)
class Sahara(_Heads):
    """Take out heads, one after the other."""

    name: ClassVar[str] = "sahara"
    equation: ClassVar[str] = "argmax_h of sum_r arccos sigma_r(U^T U_without), greedily"
    departures: ClassVar[tuple[str, ...]] = (
        _LIMIT,
        "States are those that the last layer puts out, before the final norm.",
        "Requests are in the template that the rows were made with; the paper uses none.",
    )
    published: ClassVar[str] = "Three heads (0.018 %) ASR .72 (Llama-2-7b-chat); more do not help."

    out: How = setting("undifferentiated", "How a head is taken out.")
    n_heads: int = setting(3, "How many heads are taken out.", min=1)
    rank: int = setting(1, "Of the subspaces.", min=1)

    def _find(self, inputs: Inputs) -> Changed:
        model, safety = inputs.model, inputs.safety
        assert safety is not None
        _check_number(self.n_heads, "n_heads", model)
        every = every_head(model)
        last = max(find_heads(model))

        def subspace() -> Subspace:
            return left_subspace(model, safety, layer=last, rank=self.rank)

        intact = subspace()

        def without(heads: list[Head]) -> float:
            with intervene(model, _without(model, heads, self.out)):
                return float(principal_angles(intact, subspace()).sum())

        def measure(sets: Sequence[tuple[int, ...]]) -> list[float]:
            return [without([every[n] for n in own]) for own in sets]

        found = greedily(measure, len(every), self.n_heads)
        chosen = [every[number] for number in found.chosen]
        return _outcome(model, chosen, self.out, found.effect.tolist())


def every_head(model: nn.Module) -> list[Head]:
    """Every query head of a model; errors as of `find_heads`."""
    return [
        (layer, head) for layer, own in find_heads(model).items() for head in range(own.n_heads)
    ]


def channels(model: nn.Module, chosen: Sequence[Head]) -> UnitSet:
    """The units of heads: the channels that they put into O."""
    every = find_heads(model)
    sizes = {name: module.n_units for name, module in find_modules(model).items()}
    indices: dict[str, list[Tensor]] = {}
    for layer, head in chosen:
        name = every[layer].name
        own = torch.arange(sizes[name]).view(every[layer].n_heads, -1)  # [heads, channels]
        indices.setdefault(name, []).append(own[head])
    return UnitSet({name: torch.cat(parts) for name, parts in indices.items()}, sizes)


def queries(model: nn.Module, chosen: Sequence[Head]) -> Selection:
    """The rows of Q of heads, and the rows of K that no other head reads.

    Without either all scores of a head are 0. Rows of V, gates and columns of O are left out.
    """
    # Rows that several heads read are chosen where all of these are: else others would change too.
    of_layers: dict[int, list[int]] = {}
    for layer, head in chosen:
        of_layers.setdefault(layer, []).append(head)
    whole = reduce(
        Selection.__or__, (heads(model, {layer: own}) for layer, own in of_layers.items())
    )
    return whole - units(model, channels(model, chosen), shared="any")


def _without(model: nn.Module, chosen: Sequence[Head], how: How) -> WeightChange:
    """What takes heads out."""
    # A head is its channels of O, whatever V holds: so that heads which share V stay as they are.
    if how == "scaled":
        return Zero(channels(model, chosen))
    return Zero(queries(model, chosen))


def _outcome(model: PreTrainedModel, chosen: list[Head], how: How, effect: list[float]) -> Changed:
    every = every_head(model)

    # From all layers: a head's layer is a part of what the method chose.
    def draw(seed: int) -> tuple[WeightChange, ...]:
        drawn = random_numbers(len(chosen), len(every), seed)
        return (_without(model, [every[number] for number in drawn], how),)

    facts = {"heads": [list(head) for head in chosen], "effect": effect}
    return Changed((_without(model, chosen, how),), draw, facts=facts)


def _check_number(number: int, name: str, model: nn.Module) -> None:
    n = len(every_head(model))
    if number > n:
        raise ValueError(f"{name} is {number}; the model has {n} heads, it must be at most that")
