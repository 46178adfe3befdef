"""Groups from many draws of rows: how much two draws have in common.

For each size n, two disjoint sets of n safety prompts and of n utility prompts are drawn again and
again. Each draw is scored and grouped from the moments of its rows, so that no model runs here. Of
the rows with the same prompt a draw has one: with the prompt in both sets of a pair, the two would
agree more than other prompts do. Two groups
A and B are compared by the overlap of Jaccard, |A and B| / |A or B|. For example, two SCU groups of
10 units that share 8 overlap by 8 / 12 = 0.67. By chance two sets of a share p of all units overlap
by p / (2 - p): 0.005 at 1 %, and 0.081 at 15 %, which is why the figure stands beside it.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssah.groups import GROUPS, UnitGroups
from ssah.studies.stability.row_moments import RowMoments
from ssah.studies.study import grouped
from ssah.units import UnitSet

if TYPE_CHECKING:
    from ssah.studies.stability.settings import StabilitySettings

# By which score the units of a module are ranked.
_ORDERS = ("safety", "utility", "difference")


class Draws:
    """Draws pairs of disjoint sets of rows, and compares what they give.

    Args:
        folder: where the moments are; read when they are first needed.
        settings: of the study.
        prompts: for ``"safety"`` and ``"utility"`` the prompt of every row.
    """

    def __init__(
        self,
        folder: Path,
        settings: StabilitySettings,
        prompts: Mapping[str, Sequence[Hashable]],
    ) -> None:
        self.folder, self.settings, self.prompts = folder, settings, prompts

    @cached_property
    def moments(self) -> dict[str, RowMoments]:
        return {role: RowMoments.load(self.folder / role) for role in ("safety", "utility")}

    @cached_property
    def whole(self) -> UnitGroups:
        """The groups from all rows."""
        return self.groups({role: moments.scores() for role, moments in self.moments.items()})

    def groups(self, scores: Mapping[str, Mapping[str, Tensor]]) -> UnitGroups:
        """Groups of the shares of the settings; scores are ``[n_units]`` a module."""
        own = self.settings
        return grouped(own, scores, scu=own.scu, ucu=own.ucu, ru=own.ru)

    def pair(self, size: int, number: int) -> list[UnitGroups]:
        """The groups of two draws of ``size`` rows, no two of which have the same prompt."""
        # The seed is that of this pair alone: another list of sizes gives the same draws.
        generator = torch.Generator().manual_seed(self.settings.seed + 1_000_003 * size + number)
        halves: list[dict[str, dict[str, Tensor]]] = [{}, {}]
        for role, moments in self.moments.items():
            order = torch.randperm(len(moments), generator=generator).tolist()
            # The first row of each prompt in this order; a dict keeps what came first.
            first: dict[Hashable, int] = {}
            for row in order:
                first.setdefault(self.prompts[role][row], row)
            rows = torch.tensor(list(first.values()))  # [prompts]
            for i, half in enumerate(halves):
                half[role] = moments.scores(rows[i * size : (i + 1) * size])
        return [self.groups(half) for half in halves]

    def compare(self, size: int) -> dict[str, Any]:
        """Overlaps and correlations at one size, over all resamples."""
        pairs = [self.pair(size, number) for number in range(self.settings.resamples)]
        return {
            "size": size,
            "groups": {group: self._overlaps(group, pairs) for group in GROUPS},
            "spearman": {
                order: _spread("value", [_correlation(one, two, order) for one, two in pairs])
                for order in _ORDERS
            },
        }

    def _overlaps(self, group: str, pairs: Sequence[Sequence[UnitGroups]]) -> dict[str, Any]:
        whole = self.whole[group]
        with_all = [jaccard(each[group], whole) for pair in pairs for each in pair]
        return {
            **_spread("overlap", [jaccard(first[group], second[group]) for first, second in pairs]),
            "overlap_with_all": _mean(with_all),
            "by_chance": chance_overlap(whole.fraction),
        }


def jaccard(first: UnitSet, second: UnitSet) -> float:
    """Units in both / units in either, in [0, 1]; 1 where both are empty."""
    either = len(first | second)
    return len(first & second) / either if either else 1.0


def chance_overlap(share: float) -> float:
    """What :func:`jaccard` of two random sets of a share p of all units is near to: p / (2 - p)."""
    return share / (2 - share)


def spearman(first: Tensor, second: Tensor) -> float | None:
    """Rank correlation of two sets of scores, in [-1, 1]; equal scores have their mean rank.

    None where all scores of a set are equal, as of an expert that no token reached.

    Args:
        first, second: ``[units]``, on the CPU.
    """
    if any(bool(scores.amin() == scores.amax()) for scores in (first, second)):
        return None
    from scipy import stats  # imported when it is needed: it takes most of a second

    return float(stats.spearmanr(first.numpy(), second.numpy()).statistic)


def _correlation(first: UnitGroups, second: UnitGroups, order: str) -> float:
    """Mean over modules of the rank correlation: between modules, scores differ anyway.

    Modules whose scores are all equal count for nothing.

    Raises:
        ValueError: there is no other module.
    """

    def ranked(groups: UnitGroups, name: str) -> Tensor:  # [n_units]
        safety, utility = groups.safety[name], groups.utility[name]
        return {"safety": safety, "utility": utility, "difference": safety - utility}[order]

    each = [spearman(ranked(first, name), ranked(second, name)) for name in first.sizes]
    found = [correlation for correlation in each if correlation is not None]
    if not found:
        raise ValueError(
            f"{order} scores are equal within every module, so that nothing correlates"
        )
    return _mean(found)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _spread(name: str, values: Sequence[float]) -> dict[str, Any]:
    """Mean, and the middle 80 % of the resamples."""
    # Not an interval of the mean: it says how far a single pair of draws may be from it.
    bounds = torch.tensor([0.1, 0.9], dtype=torch.float64)
    low, high = torch.quantile(torch.tensor(values, dtype=torch.float64), bounds).tolist()
    return {name: _mean(values), f"{name}_middle": [low, high]}
