"""Stability: would other prompts have given the same groups, and how many suffice?

For every size n, two sets of n safety rows and two of n utility rows are drawn, disjoint, again and
again; units are scored and grouped with each, and the two results compared. Moments are kept row by
row, so that each set is passed through the model once.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssah.data import DataError, encode
from ssah.groups import GROUPS, UnitGroups, classify
from ssah.models import move, weights_hash
from ssah.report.pictures.stability import plot_stability
from ssah.storage import check_free
from ssah.studies.inputs import Loading, Sources
from ssah.studies.run import Run
from ssah.studies.stability.row_moments import RowMoments, row_moments
from ssah.studies.stability.settings import StabilitySettings
from ssah.studies.steps import Steps
from ssah.units import UnitSet

__all__ = ["StabilitySettings", "chance_overlap", "jaccard", "spearman", "stability"]

KIND = "stability"
MOMENTS = "moments"  # folder of a run
_ORDERS = ("safety", "utility", "difference")


def stability(
    loading: Loading, out: Path, settings: StabilitySettings, *, safety: str, utility: str
) -> dict[str, Any]:
    """Measure how far groups and scores depend on which prompts they were taken from.

    Args:
        loading: of the model.
        out: folder of the run.
        settings: what is measured.
        safety, utility: rows to draw from, as ``ssah.data.load_rows`` takes them.

    Returns:
        the record of the run; ``result`` has ``sizes`` (per size: ``groups``, ``spearman``) and
        ``suffices`` (per group the smallest size that suffices, or None).

    Raises:
        ValueError: a set has fewer rows than twice the largest size.
    """
    check_free(out)
    sources = Sources(loading.reading)
    rows = {"safety": sources.rows("safety", safety), "utility": sources.rows("utility", utility)}
    _check_enough(settings, {role: len(own) for role, own in rows.items()})
    model, tokenizer = loading("auto")
    examples = {
        role: list(
            encode(
                own, tokenizer, max_length=settings.max_length, overlong=loading.reading.overlong
            )
        )
        for role, own in rows.items()
    }
    _check_enough(settings, {role: len(own) for role, own in examples.items()})
    run = Run(
        out,
        KIND,
        {**loading.settings(), "weights": weights_hash(model), **asdict(settings)},
        sources.record,
    )
    with Steps(run, 4 + len(settings.sizes)) as steps:
        dtype, _ = loading.precision(steps, model.device)
        move(model, getattr(torch, dtype))
        for role, own in examples.items():

            def compute(role: str = role, own: Any = own) -> dict[str, Any]:
                with steps.part(role, len(own)) as advance:
                    found = row_moments(
                        model, tokenizer, own, tokens=settings.tokens, advance=advance
                    )
                found.save(out / MOMENTS / role)
                return {"rows": len(found)}

            steps(f"moments-{role}", compute, lambda found: f"{found['rows']} rows")
        draws = _Draws(out / MOMENTS, settings)
        units = steps("units", lambda: draws.units, lambda units: f"{units:,}")
        sizes = [
            steps(f"size-{size}", partial(draws.compare, size), _line)
            for size in sorted(set(settings.sizes))
        ]
    shutil.rmtree(out / MOMENTS, ignore_errors=True)
    result = {
        "dtype": dtype,
        "units": units,
        "rows": {role: len(own) for role, own in examples.items()},
        "sizes": sizes,
        "suffices": {
            group: next(
                (s["size"] for s in sizes if s["groups"][group]["overlap"] >= settings.enough), None
            )
            for group in GROUPS
        },
        "rule": (
            "A number of prompts suffices for a group if the groups of two disjoint draws of that "
            f"many overlap (Jaccard) by {settings.enough:g} on average."
        ),
        "enough": settings.enough,
    }
    title = f"{loading.name}: groups from other prompts"
    return run.finish(result, [plot_stability(result, out / "stability.png", title)])


def _check_enough(settings: StabilitySettings, rows: Mapping[str, int]) -> None:
    for role, n in rows.items():
        if n < 2 * max(settings.sizes):
            raise DataError(
                f"{role} has {n} rows; two disjoint draws of {max(settings.sizes)} need "
                f"{2 * max(settings.sizes)}: give more rows, or smaller sizes"
            )


class _Draws:
    """Draws pairs of disjoint sets of rows, and compares what they give.

    Args:
        folder: where the moments are; read when they are first needed.
        settings: of the run.
    """

    def __init__(self, folder: Path, settings: StabilitySettings) -> None:
        self.folder, self.settings = folder, settings

    @cached_property
    def moments(self) -> dict[str, RowMoments]:
        return {role: RowMoments.load(self.folder / role) for role in ("safety", "utility")}

    @cached_property
    def whole(self) -> UnitGroups:
        """The groups from all rows."""
        return self.groups({role: moments.scores() for role, moments in self.moments.items()})

    @property
    def units(self) -> int:
        return sum(self.whole.sizes.values())

    def groups(self, scores: Mapping[str, Mapping[str, Tensor]]) -> UnitGroups:
        own = self.settings
        return classify(
            scores["safety"],
            scores["utility"],
            scu=own.scu,
            ucu=own.ucu,
            ru=own.ru,
            scope=own.scope,
            normalize=own.normalize,
        )

    def compare(self, size: int) -> dict[str, Any]:
        """Overlaps and correlations at one size, over all resamples."""
        overlaps: dict[str, list[float]] = {group: [] for group in GROUPS}
        with_all: dict[str, list[float]] = {group: [] for group in GROUPS}
        correlations: dict[str, list[float]] = {order: [] for order in _ORDERS}
        for draw in range(self.settings.resamples):
            generator = torch.Generator().manual_seed(self.settings.seed + 1_000_003 * size + draw)
            halves: list[dict[str, dict[str, Tensor]]] = [{}, {}]
            for role, moments in self.moments.items():
                order = torch.randperm(len(moments), generator=generator)
                for i, half in enumerate(halves):
                    half[role] = moments.scores(order[i * size : (i + 1) * size])
            first, second = (self.groups(half) for half in halves)
            for group in GROUPS:
                overlaps[group].append(jaccard(first[group], second[group]))
                with_all[group] += [
                    jaccard(each[group], self.whole[group]) for each in (first, second)
                ]
            for order_, values in correlations.items():
                values.append(_correlation(first, second, order_))
        return {
            "size": size,
            "groups": {
                group: {
                    **_spread("overlap", overlaps[group]),
                    "overlap_with_all": _mean(with_all[group]),
                    "by_chance": chance_overlap(self.whole[group].fraction),
                }
                for group in GROUPS
            },
            "spearman": {order: _spread("value", each) for order, each in correlations.items()},
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
    found = []
    for name in first.sizes:
        values = []
        for groups in (first, second):
            safety, utility = groups.safety[name], groups.utility[name]
            own = {"safety": safety, "utility": utility, "difference": safety - utility}
            values.append(own[order])
        correlation = spearman(*values)
        if correlation is not None:
            found.append(correlation)
    if not found:
        raise ValueError(
            f"{order} scores are equal within every module, so that nothing correlates"
        )
    return _mean(found)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _spread(name: str, values: Sequence[float]) -> dict[str, Any]:
    """Mean, and the middle 80 % of the resamples."""
    bounds = torch.tensor([0.1, 0.9], dtype=torch.float64)
    low, high = torch.quantile(torch.tensor(values, dtype=torch.float64), bounds).tolist()
    return {name: _mean(values), f"{name}_middle": [low, high]}


def _line(found: Mapping[str, Any]) -> str:
    overlaps = (f"{group} {own['overlap']:.2f}" for group, own in found["groups"].items())
    return f"overlap {', '.join(overlaps)}"
