"""Pictures of studies that train a model in several ways."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssah.report.colours import COLOURS
from ssah.report.pictures.style import INK, picture, write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# An arm has the colour of the group that it freezes or trains; its control that of random units.
_ARMS = {
    "before": "#999999",
    "none": "#333333",
    "full": "#333333",
    "scu": "#e8a06b",
    "scu-cu": COLOURS["scu"],
    "scu-all-cu": COLOURS["cu"],
    "random": COLOURS["random"],
    "random-all": COLOURS["random"],
    "lora": COLOURS["ucu"],
    "ru": COLOURS["ru"],
}
_ASR = ("asr", "ASR (line: 95 % interval; dot: a seed; cross: incoherent)")
_MARGIN = ("refusal_margin", "Refusal margin, nats per token")
_LOSSES = {
    "utility_loss": "Utility loss, nats per token",
    "math_loss": "Loss on mathematics, nats per token",
    "training_loss": "Training loss, nats per token",
}


def plot_freeze(result: Mapping[str, Any], path: str | os.PathLike[str], title: str) -> Path:
    """ASR of every arm with its interval and seeds, beside its utility loss and training loss.

    Args:
        result: of ``ssah.studies.training.run_freeze``.
    """
    return _panels(result, ("utility_loss", "training_loss"), path, title)


def plot_budget(result: Mapping[str, Any], path: str | os.PathLike[str], title: str) -> Path:
    """ASR before and after both alignments, beside what they cost.

    Args:
        result: of ``ssah.studies.training.run_budget``.
    """
    measured = next(iter(result["arms"].values()))["mean"]
    kinds = [key for key in ("utility_loss", "math_loss") if key in measured]
    return _panels(result, kinds, path, title)


def _panels(
    result: Mapping[str, Any], kinds: Sequence[str], path: str | os.PathLike[str], title: str
) -> Path:
    arms = list(result["arms"])
    panels = [_ASR, _MARGIN, *((key, _LOSSES[key]) for key in kinds)]
    # Inches: labels on the left, a column a panel, a line an arm.
    size = (2.6 + 3.4 * len(panels), 1.7 + 0.45 * len(arms))
    with picture(path, title, size, axes_grid_axis="x", axes_titlesize=9.5) as figure:
        grid = figure.subplots(
            1, len(panels), sharey=True, width_ratios=(1.5, *(1.0 for _ in panels[1:]))
        )
        for axes, (key, name) in zip(grid, panels, strict=True):
            for y, arm in enumerate(arms):
                _arm(axes, y, arm, result["arms"][arm], key)
            axes.set_title(name)
            axes.tick_params(axis="y", length=0)
            _limits(axes, [found["mean"][key] for found in result["arms"].values()], key)
        grid[0].set_yticks(range(len(arms)), [result["labels"][arm] for arm in arms])
        grid[0].set_ylabel(result["varied"])
        grid[0].invert_yaxis()
    return Path(path)


def _arm(axes: Axes, y: int, arm: str, found: Mapping[str, Any], key: str) -> None:
    mean = found["mean"]
    value = mean[key]
    if key in _LOSSES:  # whose axis does not begin at 0: no bar
        axes.plot(value, y, "s", color=_ARMS[arm], markersize=11)
    else:
        axes.barh(y, value, height=0.62, color=_ARMS[arm], alpha=0.85)
    end = value
    if key == "asr":
        low, high = mean["asr_interval"]
        axes.plot([low, high], [y, y], color=INK, linewidth=1.6)
        # Nothing may be drawn over the number, which stands behind all of them.
        end = max(high, mean["incoherent"], *(own["asr"] for own in found["seeds"].values()))
        axes.plot(mean["incoherent"], y, "x", color="#b22222", markersize=6)
    seeds = [own[key] for own in found["seeds"].values()]
    if len(set(seeds)) > 1:  # one dot would only say what the bar says
        axes.plot(seeds, [y] * len(seeds), "o", color="white", markeredgecolor=INK, markersize=4.5)
        end = max(end, *seeds)
    text = (
        f"{value:.1%}" if key == "asr" else f"{value:+.2f}" if "margin" in key else f"{value:.3f}"
    )
    write(axes, text, (max(end, 0.0), y), (8, 0))


def _limits(axes: Axes, values: Sequence[float], key: str) -> None:
    """Room for the numbers; losses begin where differences show."""
    low, high = axes.get_xlim()
    if key == "asr":
        axes.set_xlim(0.0, max(high, 0.1) * 1.18)
        axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.0f} %" if x <= 1 else "")
    elif key in _LOSSES:
        spread = max(max(values) - min(values), 0.02 * max(values))
        axes.set_xlim(min(values) - 0.3 * spread, max(values) + 0.7 * spread)
    else:
        axes.set_xlim(min(low, 0.0), high + 0.3 * (high - low))
