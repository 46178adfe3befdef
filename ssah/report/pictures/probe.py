"""Picture of a probe: distances by layer, of one model or of an aligned beside another one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ssah.report.colours import COLOURS
from ssah.report.pictures.style import DASHED, INK, footnote, picture, whole_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

    from ssah.evaluation import Probe

_REFUSAL, _COMPLIANCE = "#0072b2", "#d55e00"
_MODELS = (COLOURS["cu"], COLOURS["random"])


def plot_probe(probes: Mapping[str, Probe], path: str | os.PathLike[str], title: str) -> Path:
    """Distances to the refusing and the complying version, and their difference.

    One panel a model with both distances by layer; then the difference by layer and by number of
    tokens, all models together. Bands are 95 % bootstrap intervals over requests.

    Args:
        probes: name of the model -> what ``ssah.probe`` returned; one or two.
    """
    with picture(path, title, (12, 8)) as figure:
        grid = figure.add_gridspec(2, 2)
        first: Axes | None = None  # whose scale the second model's panel takes, to be compared
        for column, (name, probe) in enumerate(probes.items()):
            place = grid[0, :] if len(probes) == 1 else grid[0, column]
            axes = figure.add_subplot(place, sharey=first)
            _distances(axes, probe)
            axes.set_title(name)
            if first is None:
                first = axes
                axes.set_ylabel("cosine distance less baseline")
                axes.legend(loc="best", fontsize=9)
        layers, tokens = figure.add_subplot(grid[1, 0]), figure.add_subplot(grid[1, 1])
        for colour, (name, probe) in zip(_MODELS, probes.items(), strict=False):
            values = probe.differences  # [requests, tokens, layers + 1]
            _curve(layers, probe, values[:, -1], range(values.shape[2]), colour, name)
            counts = range(1, values.shape[1] + 1)
            _curve(tokens, probe, values.mean(2), counts, colour, name)
        for axes, label in ((layers, "layer (0: embeddings)"), (tokens, "generated tokens")):
            axes.axhline(0, color=INK, linewidth=0.9)
            axes.set_xlabel(label)
            whole_numbers(axes)
        layers.set_ylabel("compliance less refusal")
        layers.set_title("Difference by layer (above 0: nearer to the refusal)")
        tokens.set_title("Difference by number of tokens, mean over layers")
        if len(probes) > 1:
            layers.legend(loc="best", fontsize=9)
        footnote(
            figure,
            "distance of a request with an opened answer to the request alone; baseline: of two "
            "requests alone; bands: 95 % intervals, bootstrap by request",
        )
    return Path(path)


def _distances(axes: Axes, probe: Probe) -> None:
    for name, distances, colour in (
        ("request + start of a refusal", probe.refusal_distances, _REFUSAL),
        ("request + start of a compliance", probe.compliance_distances, _COMPLIANCE),
    ):
        values = distances[:, -1] - probe.baselines[-1]  # [requests, layers + 1], of all tokens
        _curve(axes, probe, values, range(values.shape[1]), colour, name)
    axes.axhline(0, color=INK, linewidth=0.9, linestyle=DASHED)
    axes.set_xlabel("layer (0: embeddings)")
    whole_numbers(axes)


def _curve(
    axes: Axes, probe: Probe, values: Tensor, places: range, colour: str, label: str
) -> None:
    """Means of ``values`` [requests, places], with their intervals."""
    low, high = probe.intervals(values).unbind(1)
    axes.fill_between(places, low.tolist(), high.tolist(), color=colour, alpha=0.18, linewidth=0)
    axes.plot(
        places, values.mean(0).tolist(), color=colour, marker="o", markersize=3, linewidth=1.6,
        label=label,
    )  # fmt: skip
