"""Picture of stability: overlap of groups and correlation of scores against prompts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssah.report import COLOURS, NAMES
from ssah.report.pictures.style import INK, picture

__all__ = ["plot_stability"]

_CHANCE = (0, (1, 2))
_ORDERS = {
    "safety": (COLOURS["scu"], "safety importance"),
    "utility": (COLOURS["ucu"], "utility importance"),
    "difference": (INK, "their difference"),
}


def plot_stability(result: Mapping[str, Any], path: str | os.PathLike[str], title: str) -> Path:
    """Overlap of two disjoint draws per group, with that expected by chance, and Spearman's rho.

    Args:
        result: of ``ssah.studies.stability.run.stability``.
        path: of the PNG.
        title: over the picture.

    Raises:
        ImportError: matplotlib is not installed.
    """
    rows = result["sizes"]
    x = [row["size"] for row in rows]
    with picture(path, title, (11.5, 5.6)) as figure:
        left, right = figure.subplots(1, 2)
        for group in rows[0]["groups"]:
            own = [row["groups"][group] for row in rows]
            middle = [each["overlap_middle"] for each in own]
            colour = COLOURS[group]
            left.fill_between(x, *zip(*middle, strict=True), color=colour, alpha=0.15, linewidth=0)
            overlap = [each["overlap"] for each in own]
            left.plot(x, overlap, color=colour, marker="o", linewidth=1.8, label=NAMES[group])
            left.plot(x, [each["by_chance"] for each in own], color=colour, linestyle=_CHANCE)
        left.plot([], [], color=INK, linestyle=_CHANCE, label="by chance")
        left.axhline(result["enough"], color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        left.annotate(
            f"suffices: {result['enough']:g}",
            (0, result["enough"]),
            xycoords=("axes fraction", "data"),
            xytext=(4, 4),
            textcoords="offset points",
            fontsize=9,
            color=INK,
        )
        left.set_title("Overlap (Jaccard) of groups from disjoint prompts")
        for order, (colour, name) in _ORDERS.items():
            own = [row["spearman"][order] for row in rows]
            middle = [each["value_middle"] for each in own]
            right.fill_between(x, *zip(*middle, strict=True), color=colour, alpha=0.15, linewidth=0)
            values = [each["value"] for each in own]
            right.plot(x, values, color=colour, marker="o", linewidth=1.8, label=name)
        right.set_title("Rank correlation (Spearman) of scores, mean over modules")
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.set_xticks(x, [str(n) for n in x])
            axes.minorticks_off()
            axes.set_xlabel("prompts of each kind")
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, fontsize=9)
        left.set_ylim(0.0, 1.02)
        right.set_ylim(min(0.0, right.get_ylim()[0]), 1.02)
    return Path(path)
