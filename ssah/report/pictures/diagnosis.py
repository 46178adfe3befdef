"""Picture of a diagnosis: four views of what alignment changed, each beside its controls."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssah.report.colours import COLOURS
from ssah.report.pictures.style import DASHED, INK, footnote, picture, whole_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MODELS = {"base": COLOURS["cu"], "aligned": COLOURS["scu"], "random": COLOURS["random"]}
_UTILITY = COLOURS["ucu"]


def plot_diagnosis(result: Mapping[str, Any], path: str | os.PathLike[str], title: str) -> Path:
    """Separation and overlap by layer, gradient norms, and the sweep of alpha.

    Args:
        result: of `ssah.studies.diagnosis.diagnose`.
        path, title: as of all pictures.
    """
    with picture(path, title, (12, 8)) as figure:
        axes = figure.subplots(2, 2)
        _separation(axes[0, 0], result["separation"])
        _overlap(axes[0, 1], result["overlap"])
        _gradients(axes[1, 0], result["gradients"])
        _sweep(axes[1, 1], result["alphas"])
        footnote(
            figure,
            "random: the change in random places, or random subspaces with two standard "
            "deviations; halves: of the ordinary requests; bars: 95 % intervals",
        )
    return Path(path)


def _separation(axes: Axes, found: Mapping[str, Any]) -> None:
    for name, colour in _MODELS.items():
        values = found[name]["harmful"]["ratio"]
        axes.plot(range(len(values)), values, color=colour, marker="o", markersize=3, label=name)
    halves = found["aligned"]["halves"]["ratio"]
    axes.plot(range(len(halves)), halves, color=_UTILITY, linestyle=DASHED, label="halves, aligned")
    axes.set(xlabel="layer", ylabel="between / within", yscale="log")
    axes.set_title("Harmful and ordinary requests part")
    axes.legend(fontsize=9)
    whole_numbers(axes)


def _overlap(axes: Axes, found: Sequence[Mapping[str, Any]]) -> None:
    by_layer = layer_means(found)
    layers = list(by_layer)
    for key, colour in (("overlap", _MODELS["aligned"]), ("random", _MODELS["random"])):
        values = [own[key] for own in by_layer.values()]
        axes.plot(layers, values, color=colour, marker="o", markersize=3, label=key)
    low, high = (
        [own["random"] + width * own["random_sd"] for own in by_layer.values()] for width in (-2, 2)
    )
    axes.fill_between(layers, low, high, color=_MODELS["random"], alpha=0.2, linewidth=0)
    utility = [own["utility"] for own in by_layer.values()]
    axes.plot(layers, utility, color=_UTILITY, linestyle=DASHED, label="utility")
    axes.set(xlabel="layer", ylabel="overlap", ylim=(0, 1))
    axes.set_title("Does the change lie where weights put out much?")
    axes.legend(fontsize=9)
    whole_numbers(axes)


def layer_means(found: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    """The mean over the matrices of each layer; of standard deviations too, which is cautious."""
    layers: dict[int, list[Mapping[str, Any]]] = {}
    for own in found:
        # The first number in a qualified name is that of the layer.
        layers.setdefault(int(re.findall(r"\.(\d+)\.", own["matrix"])[0]), []).append(own)
    keys = ("overlap", "random", "random_sd", "utility")
    return {
        layer: {key: sum(own[key] for own in rows) / len(rows) for key in keys}
        for layer, rows in sorted(layers.items())
    }


def _gradients(axes: Axes, found: Mapping[str, Any]) -> None:
    places = range(len(_MODELS))
    for shift, kind in ((-0.2, "harmful"), (0.2, "ordinary")):
        own = [found[name][kind] for name in _MODELS]
        axes.bar(
            [place + shift for place in places],
            [each["mean"] for each in own],
            0.38,
            yerr=[
                [each["mean"] - each["interval"][0] for each in own],
                [each["interval"][1] - each["mean"] for each in own],
            ],
            color=_MODELS["aligned"] if kind == "harmful" else _UTILITY,
            ecolor=INK,
            label=kind,
        )
    axes.set_xticks(list(places), list(_MODELS))
    axes.set_ylabel("norm of the gradient at the prompt")
    axes.set_title("How much the first token depends on the prompt")
    axes.legend(fontsize=9)


def _sweep(axes: Axes, found: Sequence[Mapping[str, Any]]) -> None:
    loss = axes.twinx()
    loss.grid(False)
    for what in ("aligned", "random"):
        own = [each for each in found if each["change"] == what]
        alphas = [each["alpha"] for each in own]
        margins = [each["refusal_margin"]["mean"] for each in own]
        axes.plot(alphas, margins, color=_MODELS[what], marker="o", label=f"margin, {what}")
        losses = [each["utility_loss"] for each in own]
        loss.plot(alphas, losses, color=_MODELS[what], linestyle=DASHED, label=f"loss, {what}")
    axes.axhline(0, color=INK, linewidth=0.9)
    axes.set(xlabel="alpha (0: base, 1: aligned)", ylabel="refusal margin, nats per token")
    loss.set_ylabel("utility loss, nats per token (dashed)")
    axes.set_title("Part of the way, and further")
    axes.legend(fontsize=9)
