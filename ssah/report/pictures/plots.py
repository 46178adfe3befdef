"""Pictures (PNG): scores by layer, ablations, throughput. Needs matplotlib; no display."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ssah.report import COLOURS, IMPLEMENTATIONS, NAMES, SCORING
from ssah.report.pictures.style import INK, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ssah.groups import UnitGroups

__all__ = ["plot_ablations", "plot_scores", "plot_throughput"]

# Drawn in this order: the many first, so that they do not hide the few.
_GROUPS = ("cu", "ru", "ucu", "scu")
_IMPORTANCE = {
    "variance": "variance of the activation x squared column norm",
    "norm": "mean square of the activation x squared column norm",
    "taylor": "|sum of activation x gradient|, nats",
    "fisher": "sum of (activation x gradient)^2, nats^2",
    None: "as given",
}


def plot_scores(groups: UnitGroups, path: str | os.PathLike[str], title: str) -> Path:
    """I_S and I_U of every group by layer (median, and the middle 80 %), and of every unit.

    Raises:
        ImportError: matplotlib is not installed.
    """
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
        figure.supxlabel(
            f"importance: {_IMPORTANCE[groups.metadata['metric']]}; lines are medians over the "
            "group's units of a layer, bands hold the middle 80 %",
            fontsize=8.5,
            color="#666666",
        )
    return Path(path)


def _by_layer(
    axes: Axes, groups: UnitGroups, scores: Mapping[str, torch.Tensor], title: str
) -> None:
    from matplotlib.ticker import MaxNLocator

    layers: dict[int, list[str]] = {}
    for row in groups.summary()["modules"]:
        layers.setdefault(row["layer"] or 0, []).append(row["module"])
    quantiles = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    for group in _GROUPS:
        x, curves = [], []
        for layer, names in layers.items():
            own = torch.cat([scores[name][groups[group][name]] for name in names])
            if len(own):
                x.append(layer)
                curves.append(torch.quantile(_positive(own), quantiles).tolist())
        if not x:
            continue
        low, middle, high = zip(*curves, strict=True)
        axes.fill_between(x, low, high, color=COLOURS[group], alpha=0.13, linewidth=0)
        marker = "o" if len(x) < 60 else None
        axes.plot(x, middle, color=COLOURS[group], marker=marker, markersize=3, linewidth=1.6)
    axes.set_yscale("log")
    axes.set_ylabel("importance")
    axes.set_title(title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _limits(groups: UnitGroups) -> tuple[float, float]:
    """Where a logarithmic axis of importance begins and ends: without the lowest 0.5 %."""
    every = torch.cat([*groups.safety.values(), *groups.utility.values()])
    every = every[every > 0].sort().values
    if len(every) == 0:
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
            rasterized=True,
        )
        label = f"{NAMES[group]}: {len(chosen):,} units, {chosen.fraction:.1%}"
        axes.scatter([], [], s=40, color=COLOURS[group], label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.plot([low, high], [low, high], color=INK, linewidth=0.8, linestyle=(0, (4, 4)))
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_xlabel("utility importance")
    axes.set_ylabel("safety importance")
    axes.set_title("Every unit")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="upper left", handletextpad=0.3, fontsize=9)


def _positive(scores: torch.Tensor) -> torch.Tensor:
    """Scores for a logarithmic axis: zero becomes the smallest positive score."""
    positive = scores[scores > 0]
    return scores.clamp_min(float(positive.min()) if len(positive) else 1.0)


def plot_ablations(
    rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], title: str
) -> Path:
    """Utility loss and refusal margin after each ablation, beside those of the whole model.

    ``rows`` are what ``ssah.evaluation.ablations`` yields.

    Raises:
        ImportError: matplotlib is not installed.
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
    positions: list[float] = []
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
            low, high = _range(rows, key)
            panel.set_xlim(low, high)
            shown = [min(max(value, low), high) for value in values]
            panel.barh(positions, shown, height=0.72, color=colours)
            panel.axvline(whole[key], color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
            panel.axvline(0, color="#999999", linewidth=0.8)
            for y, value, end in zip(positions, values, shown, strict=True):
                cut = value != end  # the bar leaves the picture: its value stands inside
                left = (value >= 0) != cut
                text = format_.format(value)
                if cut:
                    text = f"{text} »" if value > 0 else f"« {text}"
                panel.annotate(
                    text,
                    (end, y),
                    xytext=(4 if left else -4, 0),
                    textcoords="offset points",
                    ha="left" if left else "right",
                    va="center",
                    fontsize=9,
                    color="white" if cut else INK,
                    fontweight="bold" if cut else "normal",
                    bbox=None if cut else {"facecolor": "white", "edgecolor": "none", "pad": 0.8},
                )
            panel.set_title(name, pad=20)
            place = (whole[key] - low) / (high - low)
            panel.annotate(
                f"nothing ablated {format_.format(whole[key])}",
                (whole[key], 1),
                xycoords=("data", "axes fraction"),
                xytext=(0, 4),
                textcoords="offset points",
                ha="left" if place < 0.25 else "right" if place > 0.75 else "center",
                fontsize=9,
                color=INK,
            )
        axes[0].set_yticks(positions, labels)
        axes[0].invert_yaxis()
        for panel in axes:
            panel.tick_params(axis="y", length=0)
    return Path(path)


def _range(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[float, float]:
    """Limits that hold every value but those of a model destroyed by taking out most of it."""
    values = [row[key] for row in rows if row["fraction"] <= 0.5] + [0.0]
    room = 0.2 * (max(values) - min(values) or 1.0)
    return min(values) - (room if min(values) < 0 else 0.0), max(values) + room


def plot_throughput(result: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Rates of the operators (one panel a dtype) and of ``attribute``, as ``ssah bench`` has them.

    Raises:
        ImportError: matplotlib is not installed.
    """
    dtypes = list(dict.fromkeys(row["dtype"] for row in result["operators"]))
    panels: dict[str, list[Mapping[str, Any]]] = {
        dtype: [row for row in result["operators"] if row["dtype"] == dtype] for dtype in dtypes
    }
    bars = max(len(row["seconds"]) + 1 for row in result["operators"])
    size = (4.6 * (len(dtypes) + 1) + 1.5, 1.6 + 0.2 * bars * len(panels[dtypes[0]]))
    facts = f"torch {result['torch']}, {result['threads']} threads"
    isa = f", {result['isa']}" if "isa" in result else ""
    title = f"Throughput on {result['device']} ({facts}{isa})"
    with picture(path, title, size, axes_grid_axis="x") as figure:
        axes = figure.subplots(1, len(dtypes) + 1, squeeze=False)[0]
        for panel, (dtype, rows) in zip(axes, panels.items(), strict=False):
            _rates(panel, rows, result["read_gigabytes_per_second"])
            shape = " x ".join(f"{n:,}" for n in rows[0]["shape"])
            panel.set_title(f"Operators, {dtype} [{shape}]")
        for panel in axes[1:-1]:
            panel.tick_params(labelleft=False)
        _scoring(axes[-1], result["attribute"])
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=len(labels), fontsize=9)
    return Path(path)


def _rates(axes: Axes, rows: Sequence[Mapping[str, Any]], read: float | None) -> None:
    y, ticks = 0.0, []
    named: set[str] = set()
    for row in rows:
        rates = row["gigabytes_per_second"]
        ticks.append(y + (len(rates) - 1) / 2)
        for name, rate in rates.items():
            label = None if name in named else name
            named.add(name)
            axes.barh(y, rate, height=0.86, color=IMPLEMENTATIONS[name], label=label)
            axes.annotate(
                f"{rate:.3g}",
                (rate, y),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
                color=INK,
            )
            y += 1
        y += 0.9
    if read is not None:
        axes.axvline(
            read, color=INK, linewidth=1.1, linestyle=(0, (4, 3)), label="reading memory alone"
        )
    axes.set_yticks(ticks, [row["op"] for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.margins(y=0.02)
    axes.set_xlim(0, axes.get_xlim()[1] * 1.08)
    axes.set_xlabel("GB/s moved")


def _scoring(axes: Axes, scoring: Mapping[str, Any]) -> None:
    rates = scoring["tokens_per_second"]
    places = range(len(rates))
    ours = IMPLEMENTATIONS["cpu"]
    eager = IMPLEMENTATIONS["eager"]
    colours = [IMPLEMENTATIONS.get(name, eager if name == "hooks" else ours) for name in rates]
    axes.barh(places, list(rates.values()), height=0.7, color=colours)
    for place, rate in zip(places, rates.values(), strict=True):
        axes.annotate(
            f"{rate:,.0f}",
            (rate, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=INK,
        )
    axes.set_yticks(places, [SCORING[name] for name in rates])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlim(0, max(rates.values()) * 1.18)
    axes.set_xlabel("tokens/s")
    axes.set_title(f"Scoring a Llama of {scoring['parameters'] / 1e6:.0f} M, {scoring['dtype']}")
