"""Greedy search: which selections together do the most, one joining after the other.

    chosen = {}
    round r: of every candidate c outside, the effect of taking out all chosen ones and c; the
             candidate with the largest joins

Example: candidates a, b, c have the effects 3, 2.9 and 1 alone, and with a those of b and c are 3.1
and 4. So a joins, then c, although b does more alone.

A search is the table of what was tried, ``[rounds, candidates]``; which candidate joined in a round
follows from its row. So a search that was interrupted goes on from the rounds that are kept, and
other rules for when to stop need nothing computed anew.

Source: Zhou et al., ICLR 2025, arXiv 2410.13708 (over attention heads; 3 to 5 rounds).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssah.attribution import refuse_other
from ssah.choices import check_choice
from ssah.data import check_count
from ssah.evaluation.selection_effects.arm_effects import (
    EFFECTS,
    HIDDEN_EFFECTS,
    effects,
    no_layers,
)
from ssah.evaluation.selection_effects.left_subspaces import check_repeatable, left_subspace_angles
from ssah.models import digest, weights_hash
from ssah.representations import Position, Positions, check_positions
from ssah.storage import FORMAT, META, Stored, one_run, save_tensors
from ssah.units import UnitSet, check_units

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CONTENT = "ssah greedy search"
_ANGLE = "subspace_angle"


@dataclass(frozen=True, eq=False)
class GreedySearch:
    """What a greedy search has tried and chosen.

    Attributes:
        chosen: numbers of the candidates that joined, in their order.
        tried: float64 ``[rounds, candidates]``, the effect of the chosen ones of the rounds before
            together with each candidate; NaN of those that had joined. One round more than
            ``chosen`` where the last one gained too little.
    """

    chosen: tuple[int, ...]
    tried: Tensor

    @property
    def effect(self) -> Tensor:
        """Of all that have joined so far, after each round: float64 ``[len(chosen)]``."""
        own = [self.tried[number, joined] for number, joined in enumerate(self.chosen)]
        return torch.stack(own) if own else self.tried.new_zeros(0)


def greedy_search(
    model: PreTrainedModel,
    loader: Iterable[Mapping[str, Any]],
    candidates: Sequence[UnitSet],
    *,
    effect: str = "kl",
    rounds: int = 3,
    min_gain: float = -math.inf,
    layers: Iterable[int] = (),
    positions: Positions = ("last",),
    rank: int = 1,
    arms_at_once: int = 8,
    resume_dir: str | os.PathLike[str] | None = None,
    advance: Callable[[int], None] | None = None,
) -> GreedySearch:
    """Take out the candidate that does the most, then the one that does the most beside it, ...

    The candidates of a round share batches, as in `effects`. The model is left as it was. Equal
    effects: the lower number joins.

    Args:
        model: a causal language model of transformers.
        loader: batches as of `effects`, the same ones in every iteration.
        candidates: each is taken out as a whole.
        effect: what is to be large: ``"kl"``, ``"log_prob"``, ``"l2"`` or ``"cosine_distance"``,
            the mean of `Effects.mean`; or ``"subspace_angle"``, of `left_subspace_angles`.
        rounds: how many candidates join at most.
        min_gain: a round in which the effect grows by less than this is the last, and nothing
            joins. By default there is none: an effect may also fall.
        layers, positions: as of `effects`, for hidden states; one of each for the angle.
        rank: of the subspaces of the angle.
        arms_at_once: as of `effects`.
        resume_dir: a folder that keeps each round. The same call goes on from there, also with
            other ``rounds`` and ``min_gain``.
        advance: called with the number of rounds that are done.

    Raises:
        TypeError: a candidate is no `UnitSet`, or a batch is not of this form.
        ValueError: as of `effects`; an argument is out of range; a loader that can be read but
            once; a ``resume_dir`` that is damaged, in use, or of another search.
        OSError: ``resume_dir`` cannot be written.
        FloatingPointError: an effect is NaN or infinite.
    """
    numbers, at = list(layers), check_positions(positions)
    check_count("rounds", rounds)
    check_repeatable(loader)
    if not candidates:
        raise ValueError("candidates is empty, must have at least one")
    for units in candidates:
        check_units(model, units)
    measure = _measure(model, loader, effect, numbers, at, rank, arms_at_once)
    with nullcontext() if resume_dir is None else one_run(resume_dir):
        kept = None
        if resume_dir is not None:
            # Everything that changes an effect. When the search stops does not, and how many arms
            # share a batch changes rounding alone.
            identity = {
                "weights": weights_hash(model),
                "data": digest(_pieces(loader)),
                "candidates": digest(units.over(units.sizes) for units in candidates),
                "effect": effect,
                "hidden": repr((numbers, at, rank)),
            }
            kept = _Kept(Path(resume_dir), identity, len(candidates))

        def measured(sets: Sequence[tuple[int, ...]]) -> Tensor:
            return measure([reduce(UnitSet.__or__, (candidates[i] for i in own)) for own in sets])

        def done(tried: list[Tensor]) -> None:
            if kept is not None:
                kept.keep(tried)
            if advance is not None:
                advance(len(tried))

        tried = [] if kept is None else kept.rounds()
        return greedily(measured, len(candidates), rounds, min_gain, tried=tried, done=done)


def greedily(
    measure: Callable[[Sequence[tuple[int, ...]]], Tensor | Sequence[float]],
    n: int,
    rounds: int,
    min_gain: float = -math.inf,
    *,
    tried: Sequence[Tensor] = (),
    done: Callable[[list[Tensor]], None] | None = None,
) -> GreedySearch:
    """The search of `greedy_search` with another effect.

    Args:
        measure: gives the effect of each of several sets of candidates, given by their numbers:
            ``[sets]``.
        n: how many candidates there are.
        rounds, min_gain: as of `greedy_search`.
        tried: rounds that are known, ``[n]`` each.
        done: called after each round with all of them.
    """
    table = list(tried)
    while True:
        chosen, ended = _chosen(table, rounds, min_gain)
        if ended:
            break
        # A candidate that has joined would have the effect of the round before, and might win
        # again.
        outside = [i for i in range(n) if i not in chosen]
        row = torch.full((n,), math.nan, dtype=torch.float64)
        found = measure([(*chosen, i) for i in outside])
        row[outside] = torch.as_tensor(found, dtype=torch.float64)
        table.append(row)
        if done is not None:
            done(table)
    # What is known may be more rounds than are asked for. The round that gained too little is
    # shown, since it says why the search ended.
    return GreedySearch(tuple(chosen), torch.stack(table[: len(chosen) + (len(chosen) < rounds)]))


def _chosen(tried: Sequence[Tensor], rounds: int, min_gain: float) -> tuple[list[int], bool]:
    """Who has joined by the rounds that are known, ``[candidates]`` each; whether that is all."""
    chosen: list[int] = []
    before = 0.0
    for row in tried[:rounds]:
        best = int(row.nan_to_num(-math.inf).argmax())  # the first of equal ones; NaN has joined
        if float(row[best]) - before < min_gain:
            return chosen, True  # the table keeps this round: a lower min_gain goes on from it
        chosen.append(best)
        before = float(row[best])
    full = bool(tried) and len(chosen) == len(tried[0])
    return chosen, full or len(chosen) == rounds


def _measure(
    model: PreTrainedModel,
    loader: Iterable[Mapping[str, Any]],
    effect: str,
    layers: Sequence[int],
    positions: Sequence[Position],
    rank: int,
    arms_at_once: int,
) -> Callable[[Sequence[UnitSet]], Tensor]:
    """What gives one number of each selection, float64 ``[selections]``."""
    check_choice("effect", effect, (*EFFECTS, _ANGLE))
    if effect == _ANGLE:
        if len(layers) != 1 or len(positions) != 1:
            raise ValueError(
                f"effect is {effect!r} with layers {list(layers)} and positions "
                f"{list(positions)}; it must have one layer and one position"
            )
        return lambda out: left_subspace_angles(
            model,
            loader,
            out,
            layer=layers[0],
            position=positions[0],
            rank=rank,
            arms_at_once=arms_at_once,
        )
    if effect in HIDDEN_EFFECTS and not layers:  # before a round is computed
        raise no_layers(effect)
    return lambda out: effects(
        model, loader, out, layers=layers, positions=positions, arms_at_once=arms_at_once
    ).mean(effect)


def _pieces(loader: Iterable[Mapping[str, Any]]) -> Iterator[Tensor]:
    """What the batches hold, and their shapes."""
    for batch in loader:
        for key in sorted(batch):
            if isinstance(batch[key], Tensor):
                # Two rows of three tokens have the bytes of three rows of two.
                yield torch.tensor(batch[key].shape)
                yield batch[key].to(torch.int64)


class _Kept:
    """The rounds that a folder keeps."""

    def __init__(self, folder: Path, identity: dict[str, str], candidates: int) -> None:
        self._folder, self._identity, self._candidates = folder, identity, candidates

    def rounds(self) -> list[Tensor]:
        """Of each round ``[candidates]``; none where nothing was kept."""
        if not (self._folder / META).is_file():
            return []
        stored = Stored(self._folder, _CONTENT, {"identity": dict})
        # By name: what differs is what the user has to mend.
        for key, now in self._identity.items():
            refuse_other(self._folder, key, stored.meta["identity"].get(key), now)
        table = stored.tensor("tried", shape=(None, self._candidates), finite=False)
        return list(table)

    def keep(self, tried: Sequence[Tensor]) -> None:
        meta = {"content": _CONTENT, "format": FORMAT, "identity": self._identity}
        save_tensors(self._folder, {"tried": torch.stack(list(tried))}, meta)
