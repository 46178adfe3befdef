"""Picture of the scores: importance by layer, and every unit by both of its importances."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssah.report.colours import COLOURS, NAMES
from ssah.report.pictures.style import INK, footnote, picture, whole_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ssah.groups import UnitGroups

# Drawn in this order: the many first, so that they do not hide the few.
_GROUPS = ("cu", "ru", "ucu", "scu")
# What an axis of importance measures, by the metric of the scores.
_IMPORTANCE = {
    "variance": "variance of the activation x squared column norm",
    "norm": "mean square of the activation x squared column norm",
    "taylor": "|sum of activation x gradient|, nats",
    "fisher": "sum of (activation x gradient)^2, nats^2",
    None: "as given",  # scores that did not come from `attribute`
}


def plot_scores(groups: UnitGroups, path: str | os.PathLike[str], title: str) -> Path:
    """I_S and I_U of every group by layer (median, and the middle 80 %), and of every unit."""
    with picture(path, title, (12, 6.4)) as figure:
        grid = figure.add_gridspec(2, 2, width_ratios=(1.25, 1))
        upper = figure.add_subplot(grid[0, 0])
        lower = figure.add_subplot(grid[1, 0], sharex=upper, sharey=upper)
        units = figure.add_subplot(grid[:, 1])
        _by_layer(upper, groups, groups.safety, "Safety importance of a unit, by layer")
        _by_layer(lower, groups, groups.utility, "Utility importance of a unit, by layer")
        lower.set_xlabel("layer")
        upper.tick_params(labelbottom=False)
        low, high = _limits(groups)
        lower.set_ylim(low, high)
        _every_unit(units, groups, low, high)
        footnote(
            figure,
            f"importance: {_IMPORTANCE[groups.metadata['metric']]}; lines are medians over the "
            "group's units of a layer, bands hold the middle 80 %",
        )
    return Path(path)


def _by_layer(axes: Axes, groups: UnitGroups, scores: Mapping[str, Tensor], title: str) -> None:
    layers: dict[int, list[str]] = {}
    for row in groups.summary()["modules"]:
        # FFN and attention of a layer are one point; modules that belong to no layer stand at 0.
        layers.setdefault(row["layer"] or 0, []).append(row["module"])
    quantiles = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    for group in _GROUPS:
        x, curves = [], []
        for layer, names in layers.items():
            own = torch.cat([scores[name][groups[group][name]] for name in names])
            if len(own):  # a group need not have units in every layer
                x.append(layer)
                curves.append(torch.quantile(_positive(own), quantiles).tolist())
        if not x:
            continue
        low, middle, high = zip(*curves, strict=True)
        axes.fill_between(x, low, high, color=COLOURS[group], alpha=0.13, linewidth=0)
        marker = "o" if len(x) < 60 else None  # closer together they would be a bar
        axes.plot(x, middle, color=COLOURS[group], marker=marker, markersize=3, linewidth=1.6)
    axes.set_yscale("log")
    axes.set_ylabel("importance")
    axes.set_title(title)
    whole_numbers(axes)


def _limits(groups: UnitGroups) -> tuple[float, float]:
    """Where a logarithmic axis of importance begins and ends: without the lowest 0.5 %."""
    every = torch.cat([*groups.safety.values(), *groups.utility.values()])  # [2 x units]
    every = every[every > 0].sort().values
    if len(every) == 0:  # every score is 0: a decade around nothing
        return 0.1, 10.0
    return float(every[len(every) // 200]) / 2, float(every[-1]) * 2


def _every_unit(axes: Axes, groups: UnitGroups, low: float, high: float) -> None:
    for group in _GROUPS:
        chosen = groups[group]
        utility = torch.cat([groups.utility[name][chosen[name]] for name in chosen])
        safety = torch.cat([groups.safety[name][chosen[name]] for name in chosen])
        few = group in ("scu", "ucu")
        axes.scatter(
            utility.clamp_min(low).numpy(),  # what is lower stands at the edge
            safety.clamp_min(low).numpy(),
            s=9 if few else 2,
            color=COLOURS[group],
            alpha=0.8 if few else 0.25,
            linewidths=0,
            rasterized=True,  # a dot a unit, of hundreds of thousands
        )
        # The legend gets dots of its own: those of the many are too small and too faint to tell.
        label = f"{NAMES[group]}: {len(chosen):,} units, {chosen.fraction:.1%}"
        axes.scatter([], [], s=40, color=COLOURS[group], label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    # The diagonal: above it a unit matters more to safety than to utility.
    axes.plot([low, high], [low, high], color=INK, linewidth=0.8, linestyle=(0, (4, 4)))
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_xlabel("utility importance")
    axes.set_ylabel("safety importance")
    axes.set_title("Every unit")
    handles, labels = axes.get_legend_handles_labels()  # turned round: the few come first
    axes.legend(handles[::-1], labels[::-1], loc="upper left", handletextpad=0.3, fontsize=9)


def _positive(scores: Tensor) -> Tensor:
    """Scores for a logarithmic axis: zero becomes the smallest positive score."""
    positive = scores[scores > 0]
    return scores.clamp_min(float(positive.min()) if len(positive) else 1.0)
