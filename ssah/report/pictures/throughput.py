"""Picture of ``ssah bench``: rates of the operators and of scoring."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssah.report.colours import IMPLEMENTATIONS, SCORING
from ssah.report.pictures.style import DASHED, INK, picture, write

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_throughput(result: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Rates of the operators (a panel a dtype) and of ``attribute``, as ``ssah bench`` has them."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in result["operators"]))
    panels: dict[str, list[Mapping[str, Any]]] = {
        dtype: [row for row in result["operators"] if row["dtype"] == dtype] for dtype in dtypes
    }
    # The height follows from the operator that most implementations have, and a gap after each.
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
    named: set[str] = set()  # in the legend already, which must have each once
    for row in rows:
        rates = row["gigabytes_per_second"]
        ticks.append(y + (len(rates) - 1) / 2)
        for name, rate in rates.items():
            label = None if name in named else name
            named.add(name)
            axes.barh(y, rate, height=0.86, color=IMPLEMENTATIONS[name], label=label)
            write(axes, f"{rate:.3g}", (rate, y), (3, 0), fontsize=7)
            y += 1
        y += 0.9
    if read is not None:  # no operator that reads its input once can be faster than this
        label = "reading memory alone"
        axes.axvline(read, color=INK, linewidth=1.1, linestyle=DASHED, label=label)
    axes.set_yticks(ticks, [row["op"] for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.margins(y=0.02)
    axes.set_xlim(0, axes.get_xlim()[1] * 1.08)
    axes.set_xlabel("GB/s moved")


def _scoring(axes: Axes, scoring: Mapping[str, Any]) -> None:
    rates = scoring["tokens_per_second"]
    places = range(len(rates))
    ours = IMPLEMENTATIONS["cpu"]  # a metric is none of the implementations: it is drawn as ours
    eager = IMPLEMENTATIONS["eager"]
    colours = [IMPLEMENTATIONS.get(name, eager if name == "hooks" else ours) for name in rates]
    axes.barh(places, list(rates.values()), height=0.7, color=colours)
    for place, rate in zip(places, rates.values(), strict=True):
        write(axes, f"{rate:,.0f}", (rate, place))
    axes.set_yticks(places, [SCORING[name] for name in rates])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlim(0, max(rates.values()) * 1.18)
    axes.set_xlabel("tokens/s")
    axes.set_title(f"Scoring a Llama of {scoring['parameters'] / 1e6:.0f} M, {scoring['dtype']}")
