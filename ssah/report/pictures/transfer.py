"""Alluvial picture of attribute transfer: groups before, groups after, and what flows between."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ssah.report.colours import COLOURS, NAMES
from ssah.report.pictures.style import INK, footnote, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

    from ssah.groups import Transfer

# Of the height that the units take.
_GAP = 0.05  # between groups
_LABEL = 0.062  # between labels, at least
_NAMED = 0.022  # a ribbon of this height has room for its share
_NODE = 0.055  # of the width


def plot_transfer(
    moved: Transfer,
    path: str | os.PathLike[str],
    title: str,
    *,
    before: str = "before",
    after: str = "after",
) -> Path:
    """Ribbons from the groups before to the groups after, as wide as their share of all units.

    On the left are all units. On the right the units that stayed complex are left out: they are so
    many that what happens to the small groups cannot be seen beside them.

    Args:
        moved: what ``ssah.transfer`` returns.
        before, after: names of the two sides.
    """
    stayed = moved.groups.index("cu")
    small = moved.matrix.clone()
    small[stayed, stayed] = 0
    kept = float(moved.matrix[stayed, stayed])
    with picture(path, title, (12, 5.8), axes_grid=False) as figure:
        every, zoomed = figure.subplots(1, 2)
        names = [f"{group.upper()} " for group in moved.groups]
        _alluvial(every, moved.matrix, moved.groups, names, (before, after))
        every.set_title("All units")
        if float(small.sum()) > 0:
            names[stayed] += "moved\n"
            _alluvial(zoomed, small, moved.groups, names, (before, after))
        zoomed.set_title(f"Without the {kept:.1%} that were complex and stayed so")
        zoomed.set_axis_off()
        footnote(
            figure,
            "shares are of all units; "
            + ", ".join(f"{group.upper()}: {NAMES[group].split(' (')[0]}" for group in moved.groups)
            + "; a ribbon has the colour of the group before",
        )
    return Path(path)


def _alluvial(
    axes: Axes,
    flow: Tensor,
    groups: Sequence[str],
    names: Sequence[str],
    sides: tuple[str, str],
) -> None:
    """Groups as bars on both sides, and a ribbon for every flow; ``flow`` is [before, after]."""
    total = float(flow.sum())
    flow = flow / total
    left, right = (_tops(flow.sum(1)), _tops(flow.sum(0)))
    axes.set_axis_off()
    axes.set_xlim(-0.27, 1.27)
    axes.set_ylim(1 + _GAP * len(groups), -0.09)
    left_next, right_next = list(left), list(right)
    for i, source in enumerate(groups):
        for j in range(len(groups)):
            share = float(flow[i, j])
            if share == 0:
                continue
            _ribbon(axes, left_next[i], right_next[j], share, COLOURS[source], stays=i == j)
            if share >= _NAMED:
                axes.text(
                    _NODE + 0.015,
                    left_next[i] + share / 2,
                    f"{share * total:.2%}",
                    va="center",
                    fontsize=7.5,
                    color=INK,
                )
            left_next[i] += share
            right_next[j] += share
    for x, side, tops, heights in (
        (0.0, sides[0], left, flow.sum(1).tolist()),
        (1 - _NODE, sides[1], right, flow.sum(0).tolist()),
    ):
        axes.text(x + _NODE / 2, -0.03, side, ha="center", va="bottom", fontsize=10, color=INK)
        labels = [f"{n}{h * total:.2%}" for n, h in zip(names, heights, strict=True)]
        _bars(axes, x, tops, heights, dict(zip(groups, labels, strict=True)))


def _tops(shares: Tensor) -> list[float]:  # [groups]
    """Where each group's bar begins."""
    gaps = _GAP * torch.arange(len(shares))
    return (shares.cumsum(0) - shares + gaps).tolist()


def _bars(
    axes: Axes,
    x: float,
    tops: Sequence[float],
    heights: Sequence[float],
    labels: Mapping[str, str],
) -> None:
    """One side: bars, and beside them the labels of the groups, kept apart."""
    outside = -0.03 if x == 0 else 1.03
    middles = [top + height / 2 for top, height in zip(tops, heights, strict=True)]
    places = _apart(middles)
    for group, top, height, middle, place in zip(
        labels, tops, heights, middles, places, strict=True
    ):
        colour = COLOURS[group]
        # the edge keeps a group of a few units visible
        axes.bar(
            x, height, _NODE, bottom=top, align="edge", color=colour, edgecolor=colour, linewidth=1
        )
        axes.plot(
            (x if x == 0 else x + _NODE, outside), (middle, place), color=colour, linewidth=0.8
        )
        axes.text(
            outside + (-0.012 if x == 0 else 0.012),
            place,
            labels[group],
            ha="right" if x == 0 else "left",
            va="center",
            fontsize=9.5,
            fontweight="bold",
            color=colour,
        )


def _apart(middles: Sequence[float]) -> list[float]:
    """Places of labels, as near to the bars as legibility allows."""
    places: list[float] = []
    for middle in middles:
        places.append(max(middle, places[-1] + _LABEL) if places else middle)
    return places


def _ribbon(
    axes: Axes, left: float, right: float, share: float, colour: str, *, stays: bool
) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Outline

    start, end = _NODE, 1 - _NODE
    middle = (start + end) / 2
    # There along the upper edge and back along the lower one. Each edge is a Bezier curve of degree
    # three, whose two inner points stand in the middle: it leaves and arrives level.
    points = [
        *((start, left), (middle, left), (middle, right), (end, right)),
        *((end, right + share), (middle, right + share), (middle, left + share)),
        *((start, left + share), (start, left)),
    ]
    codes = [Outline.MOVETO, *[Outline.CURVE4] * 3, Outline.LINETO, *[Outline.CURVE4] * 3]
    outline = Outline(points, [*codes, Outline.CLOSEPOLY])
    alpha = 0.28 if stays else 0.55
    axes.add_patch(
        PathPatch(outline, facecolor=colour, edgecolor=colour, linewidth=0.6, alpha=alpha)
    )
