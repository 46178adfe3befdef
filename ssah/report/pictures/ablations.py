"""Picture of ablations: utility loss and refusal margin after each group is taken out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssah.report.colours import COLOURS, NAMES
from ssah.report.pictures.style import DASHED, INK, picture, write

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_ablations(
    rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], title: str
) -> Path:
    """Utility loss and refusal margin after each ablation, beside those of the whole model.

    ``rows`` are what ``ssah.evaluation.ablations`` yields.
    """
    whole, bars = rows[0], rows[1:]
    labels = [
        f"as many random ({row['units']:,})"
        if row["random"]
        else f"{NAMES[row['group']]}, {row['fraction']:.1%}"
        for row in bars
    ]
    colours = [COLOURS["random" if row["random"] else row["group"]] for row in bars]
    # A pair stands together: a group and as many random units.
    positions: list[float] = []  # [bars], in bar widths
    for row in bars:
        last = positions[-1] if positions else 0.0
        positions.append(last + (0.85 if row["random"] else 1.35))
    size = (11, 1.6 + 0.42 * len(bars))
    with picture(path, title, size, axes_grid_axis="x") as figure:
        axes: Sequence[Axes] = figure.subplots(1, 2, sharey=True)
        for panel, key, name, format_ in (
            (axes[0], "utility_loss", "Utility loss, nats per token (lower is better)", "{:.2f}"),
            (axes[1], "refusal_margin", "Refusal margin, nats per token (> 0: refuses)", "{:+.2f}"),
        ):
            values = [row[key] for row in bars]
            low, high = _range(rows, key)  # what lies outside is drawn to the edge, and marked
            panel.set_xlim(low, high)
            shown = [min(max(value, low), high) for value in values]
            panel.barh(positions, shown, height=0.72, color=colours)
            panel.axvline(whole[key], color=INK, linewidth=1.2, linestyle=DASHED)
            panel.axvline(0, color="#999999", linewidth=0.8)
            for y, value, end in zip(positions, values, shown, strict=True):
                _value(panel, y, value, end, format_)
            panel.set_title(name, pad=20)
            place = (whole[key] - low) / (high - low)
            text = f"nothing ablated {format_.format(whole[key])}"
            align = "left" if place < 0.25 else "right" if place > 0.75 else "center"
            top: Any = {"xycoords": ("data", "axes fraction"), "va": "baseline", "ha": align}
            write(panel, text, (whole[key], 1), (0, 4), **top)
        axes[0].set_yticks(positions, labels)
        axes[0].invert_yaxis()
        for panel in axes:
            panel.tick_params(axis="y", length=0)
    return Path(path)


def _value(panel: Axes, y: float, value: float, end: float, format_: str) -> None:
    """Write a value at the end of its bar; inside, where the bar leaves the picture."""
    cut = value != end
    left = (value >= 0) != cut
    text = format_.format(value)
    if cut:
        text = f"{text} »" if value > 0 else f"« {text}"
    style: dict[str, Any] = (
        {"color": "white", "fontweight": "bold"}
        if cut
        else {"bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.8}}
    )
    write(panel, text, (end, y), (4 if left else -4, 0), ha="left" if left else "right", **style)


def _range(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[float, float]:
    """Limits that hold every value but those of a model destroyed by taking out most of it."""
    values = [row[key] for row in rows if row["fraction"] <= 0.5] + [0.0]
    # A fifth on each side for the values that stand beside the bars.
    room = 0.2 * (max(values) - min(values) or 1.0)
    return min(values) - (room if min(values) < 0 else 0.0), max(values) + room
