"""Picture of stability: overlap of groups and correlation of scores against prompts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssah.report.colours import COLOURS, NAMES
from ssah.report.pictures.style import DASHED, INK, picture, write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CHANCE = (0, (1, 2))
_ORDERS = {
    "safety": (COLOURS["scu"], "safety importance"),
    "utility": (COLOURS["ucu"], "utility importance"),
    "difference": (INK, "their difference"),
}


def plot_stability(result: Mapping[str, Any], path: str | os.PathLike[str], title: str) -> Path:
    """Overlap of two disjoint draws per group, with that expected by chance, and Spearman's rho.

    Args:
        result: of ``ssah.studies.stability.run_stability``.
    """
    rows = result["sizes"]
    x = [row["size"] for row in rows]
    with picture(path, title, (11.5, 5.6)) as figure:
        left, right = figure.subplots(1, 2)
        for group in rows[0]["groups"]:
            own = [row["groups"][group] for row in rows]
            _curve(left, x, own, "overlap", COLOURS[group], NAMES[group])
            chance = [each["by_chance"] for each in own]
            left.plot(x, chance, color=COLOURS[group], linestyle=_CHANCE)
        # Every group has its own line of chance; the legend has one for all.
        left.plot([], [], color=INK, linestyle=_CHANCE, label="by chance")
        left.axhline(result["enough"], color=INK, linewidth=0.9, linestyle=DASHED)
        place = {"xycoords": ("axes fraction", "data"), "va": "baseline"}
        write(left, f"suffices: {result['enough']:g}", (0, result["enough"]), (4, 4), **place)
        left.set_title("Overlap (Jaccard) of groups from disjoint prompts")
        for order, (colour, name) in _ORDERS.items():
            own = [row["spearman"][order] for row in rows]
            _curve(right, x, own, "value", colour, name)
        right.set_title("Rank correlation (Spearman) of scores, mean over modules")
        for axes in (left, right):
            axes.set_xscale("log", base=2)  # numbers of prompts are doubled from size to size
            axes.set_xticks(x, [str(n) for n in x])
            axes.minorticks_off()
            axes.set_xlabel("prompts of each kind")
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, fontsize=9)
        left.set_ylim(0.0, 1.02)
        right.set_ylim(min(0.0, right.get_ylim()[0]), 1.02)
    return Path(path)


def _curve(
    axes: Axes, x: list[int], own: list[Mapping[str, Any]], key: str, colour: str, label: str
) -> None:
    """Means over draws of prompts, and the band that holds the middle 80 % of the draws."""
    low, high = zip(*(each[f"{key}_middle"] for each in own), strict=True)
    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    values = [each[key] for each in own]
    axes.plot(x, values, color=colour, marker="o", linewidth=1.8, label=label)
