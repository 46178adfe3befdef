"""Pictures of a scan: curves against the share ablated, and ways of grouping compared."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssah.report.colours import COLOURS, NAMES
from ssah.report.pictures.style import DASHED, INK, picture, write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Drawn in this order: what a reader looks for comes last, on top.
_CURVES = ("random", "ru", "ucu", "scu")
_MOST = 3.0  # nats above the intact model: a model that has lost more is of no use
# A way of grouping is told by three things at once: colour, line and marker.
_NORMALIZE = {"none": "#009e73", "zscore": "#d55e00", "rank": "#0072b2"}
_SCOPE = {"module": (0, (3, 2)), "model": "-"}
_TOKENS = {"labels": "o", "all": "x"}


def plot_scan(result: Mapping[str, Any], path: str | os.PathLike[str], title: str) -> Path:
    """Utility loss, refusal margin and, where it was measured, ASR against the share ablated.

    Args:
        result: of ``ssah.studies.scan.run_scan``.
    """
    from matplotlib.ticker import LogLocator

    panels = [
        ("utility_loss", "Utility loss, nats per token"),
        ("refusal_margin", "Refusal margin, nats per token"),
    ]
    if "asr" in result["intact"]:
        panels.append(("asr", "ASR (dotted: incoherent)"))
    with picture(path, title, (4.4 * len(panels) + 0.6, 4.8)) as figure:
        grid = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (key, name) in zip(grid, panels, strict=True):
            _curves(axes, result, key)
            axes.set_title(name)
            if key == "utility_loss":  # else a destroyed model presses all that matters flat
                top = result["intact"][key] + _MOST
                axes.set_ylim(top=min(axes.get_ylim()[1], top))
            axes.set_xscale("log")
            axes.set_xlabel("share of all units ablated")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(_percent)
            axes.minorticks_off()
            axes.axhline(result["intact"][key], color=INK, linewidth=1.0, linestyle=DASHED)
        if len(panels) == 3:  # fractions, with room for a line at 0 or at 1
            grid[2].set_ylim(-0.03, 1.03)
            grid[2].yaxis.set_major_formatter(_percent)
        handles, labels = grid[0].get_legend_handles_labels()
        handles += [  # of what no curve stands for
            grid[0].plot([], [], color=INK, linestyle=DASHED, linewidth=1.0)[0],
            grid[0].plot([], [], "o", color="none", markeredgecolor=INK, markersize=11)[0],
        ]
        labels += ["nothing ablated", "share chosen"]
        figure.legend(handles, labels, loc="outside lower left", ncols=len(labels), fontsize=9)
    return Path(path)


def _percent(value: float, _: int | None = None) -> str:
    return f"{100 * value:.3g} %"


def _curves(axes: Axes, result: Mapping[str, Any], key: str) -> None:
    for name in _CURVES:
        points = _mean(result["curves"][name], key)
        shares = list(points)
        axes.plot(
            shares,
            list(points.values()),
            color=COLOURS[name],
            marker="o",
            markersize=4,
            linewidth=1.8,
            label=NAMES[name],
        )
        if key == "asr":
            babble = list(_mean(result["curves"][name], "incoherent").values())
            axes.plot(shares, babble, color=COLOURS[name], linestyle=":", linewidth=1.4)
        chosen = result["chosen"].get(name)
        if chosen is not None:
            axes.plot(
                [chosen["share"]],
                [chosen[key]],
                "o",
                color="none",
                markeredgecolor=COLOURS[name],
                markeredgewidth=1.8,
                markersize=12,
            )


def _mean(points: Sequence[Mapping[str, Any]], key: str) -> dict[float, float]:
    """Share -> mean over the points that have it (random units: several draws)."""
    found: dict[float, list[float]] = {}
    for point in points:
        found.setdefault(point["share"], []).append(point[key])
    return {share: sum(values) / len(values) for share, values in found.items()}


def plot_compare(
    compared: Mapping[str, Any], tolerance: float, path: str | os.PathLike[str], title: str
) -> Path:
    """Every way of grouping: what its SCU take of safety, and what that costs.

    Args:
        compared: the ``compare`` of a scan's result.
        tolerance: nats of utility loss that may be lost.
    """
    with picture(path, title, (9.5, 5.6)) as figure:
        axes = figure.subplots()
        for way in reversed(compared["ways"]):  # the best is drawn last, on top
            axes.plot(
                [0.0, *(point["loss_rise"] for point in way["points"])],
                [0.0, *(point["taken"] for point in way["points"])],
                color=_NORMALIZE[way["normalize"]],
                linestyle=_SCOPE[way["scope"]],
                marker=_TOKENS[way["tokens"]],
                markersize=5,
                linewidth=1.5,
                label=f"{way['tokens']}, per {way['scope']}, {way['normalize']}",
            )
        axes.axvline(tolerance, color=INK, linewidth=1.0, linestyle=DASHED)
        place = {"xycoords": ("data", "axes fraction"), "va": "baseline"}
        write(axes, "tolerance", (tolerance, 1), (4, -10), **place)
        low, high = axes.get_xlim()
        # Ways that cost more than five times what is tolerated leave the picture.
        axes.set_xlim(low, min(high, 5 * tolerance) if tolerance else high)
        axes.set_xlabel("rise of the utility loss, nats per token (lower is better)")
        axes.set_ylabel(f"what is taken: {compared['by']} (higher is better)")
        axes.set_title("SCU ablated; each point is a share, at (0, 0) nothing is")
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(
            handles[::-1],
            labels[::-1],
            loc="outside right upper",
            fontsize=9,
            title="tokens, scope, normalisation (best first)",
            title_fontsize=9,
            alignment="left",
        )
    return Path(path)
