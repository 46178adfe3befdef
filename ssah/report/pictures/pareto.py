"""Methods by what they keep and by what it costs: ASR against the loss on the task."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssah.report.comparison import ALIGNED, TUNED, WHEN, by_purpose
from ssah.report.pictures.labels import label_points
from ssah.report.pictures.style import DASHED, INK, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart by people with any kind of colour vision (after Okabe and Ito).
_STAGES = {"before": "#cc79a7", "during": "#0072b2", "after": "#d55e00", "inference": "#009e73"}
_CONTROL = "#8c8c8c"
_ACROSS = 3  # curves in a line
_DOTS = 80  # of a line across the picture, one for each width of a point
_TOP, _CURVE = 5.4, 1.8  # inches: height of the picture above, and of a line of curves


def plot_pareto(result: Mapping[str, Any], path: str | os.PathLike[str], title: str) -> Path:
    """Every method that keeps refusals beside its control, and the curves of their strengths.

    Args:
        result: of ``ssah.studies.compare``.
    """
    rows = [row for purpose, rows in by_purpose(result) if purpose.tuned for row in rows]
    curved = [row for row in rows if row["curve"]]
    lines = -(-len(curved) // _ACROSS)
    with picture(path, title, (7.5, _TOP + _CURVE * lines + 0.6)) as figure:
        figure.suptitle(title, fontsize=13)  # the final size of the axes must be known below
        grid = figure.add_gridspec(1 + lines, _ACROSS, height_ratios=[_TOP, *[_CURVE] * lines])
        main = figure.add_subplot(grid[0, :])
        _legend(main, rows, result["intact"])
        for place, row in enumerate(curved):
            axes = figure.add_subplot(grid[1 + place // _ACROSS, place % _ACROSS])
            _curve(axes, row, result)
        _methods(figure, main, rows, result)
    return Path(path)


def _methods(
    figure: Figure, axes: Axes, rows: Sequence[Mapping[str, Any]], result: Mapping[str, Any]
) -> None:
    tuned, intact = result["tuned"]["mean"], result["intact"]
    named, others = [(*_place(tuned), TUNED)], []
    for row in rows:
        x, y = _place(row["mean"])
        colour = _STAGES.get(row["stage"], INK)
        if row["control"] is not None:
            beside = _place(row["control"]["mean"])
            axes.plot(*zip((x, y), beside, strict=True), color=colour, linewidth=0.8, alpha=0.5)
            axes.plot(*beside, "o", color="white", markeredgecolor=colour, markersize=5)
            others.append(beside)
        interval = row["mean"].get("asr_interval")
        if interval is not None:
            axes.plot([x, x], interval, color=colour, linewidth=3, alpha=0.25)
        axes.plot(x, y, "o", color=colour, markersize=7)
        named.append((x, y, row["method"]))
    axes.plot(*_place(tuned), "s", color=INK, markersize=8)
    axes.axhline(intact["asr"], color=INK, linewidth=1.0, linestyle=DASHED)
    axes.margins(x=0.12)
    axes.set_ylim(-0.04, max(0.3, *(y for _, y, _ in named), *(y for _, y in others)) + 0.08)
    axes.set_title("Each method where it ends: down and left is better")
    _axes(axes)
    axes.set_xlabel("task loss on held-out rows, nats per token")
    axes.set_ylabel("ASR")
    low, high = axes.get_xlim()
    line = [(low + (high - low) * i / _DOTS, intact["asr"]) for i in range(_DOTS + 1)]
    label_points(figure, axes, named, [*others, *line])  # no name is struck through by the line


def _legend(axes: Axes, rows: Sequence[Mapping[str, Any]], intact: Mapping[str, Any]) -> None:
    for stage in dict.fromkeys(row["stage"] for row in rows):
        name = f"{WHEN.get(stage, stage)} (bar: 95 % interval)"
        axes.plot([], [], "o", color=_STAGES.get(stage, INK), label=name)
    # The task loss of a model that never saw the task lies far to the right of all others.
    aligned = f"{ALIGNED} (task loss {intact['task_loss']:.2f})"
    for style, name in (
        ({"marker": "o", "markerfacecolor": "white", "linestyle": ""}, "control of the same size"),
        ({"color": _CONTROL, "linestyle": DASHED}, "below: strengths of the control"),
        (
            {"marker": "o", "markerfacecolor": "none", "markersize": 10, "linestyle": ""},
            "below: the strength chosen",
        ),
        ({"linewidth": 1.0, "linestyle": DASHED, "marker": "*"}, aligned),
    ):
        axes.plot([], [], **{"color": INK, **style}, label=name)
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.14), ncols=2, fontsize=8.5)


def _curve(axes: Axes, row: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    colour = _STAGES.get(row["stage"], INK)
    controls = [point["control"] for point in row["curve"] if point["control"] is not None]
    if controls:
        axes.plot(*zip(*map(_place, controls), strict=True), color=_CONTROL, linestyle=DASHED)
    places = [_place(point) for point in row["curve"]]
    axes.plot(*zip(*places, strict=True), "o-", color=colour, markersize=3.5)
    chosen = [place for place, point in zip(places, row["curve"], strict=True) if point["chosen"]]
    for place in chosen:
        axes.plot(*place, "o", color="none", markeredgecolor=colour, markersize=10)
    axes.plot(*_place(result["tuned"]["mean"]), "s", color=INK, markersize=5)
    axes.plot(*_place(result["intact"]), "*", color=INK, markersize=8)
    axes.set_ylim(-0.06, 1.06)
    axes.set_title(row["method"], fontsize=9)
    axes.tick_params(labelsize=8)
    _axes(axes)


def _axes(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.0f} %")


def _place(model: Mapping[str, Any]) -> tuple[float, float]:
    return model["task_loss"], model["asr"]
