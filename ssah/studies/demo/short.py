"""``ssah demo``: align a small model, score its units, group them, and take each group out."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

import ssah
from ssah.attribution import Attribution, attribute
from ssah.data import make_loader
from ssah.evaluation import ablations
from ssah.groups import GROUPS, UnitGroups, classify
from ssah.report.pictures import plot_ablations, plot_scores
from ssah.report.terminal import ablation_table, facts_table, groups_table, layers
from ssah.studies.demo.aligned_model import BATCH, DATA, aligned, measures
from ssah.studies.demo.screen import bar, heading
from ssah.studies.demo.throughput import throughput
from ssah.studies.loading import Loading
from ssah_kernels import timing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ssah.data import Loader


def run_demo(
    loading: Loading,
    out: Path,
    *,
    seconds: float,
    shares: Mapping[str, float],
    fresh: bool = False,
) -> dict[str, Any]:
    """Run the demonstration, print it as it goes, and leave everything in ``out``.

    Args:
        loading: of the model; its ``dtype`` is that of everything after the alignment.
        out: folder for the aligned model, scores, groups, pictures and ``demo.json``.
        seconds: the most that the alignment takes; 0 leaves it out.
        shares: of ``scu``, ``ucu`` and ``ru``, fractions of all units.
        fresh: align anew, although ``out`` has an aligned model.

    Returns:
        What ``demo.json`` holds, as plain data.
    """
    # Shares that no classification takes are refused before minutes are spent.
    one = {"module": torch.zeros(1, dtype=torch.float64)}  # [n_units]
    sort = partial(classify, scu=shares["scu"], ucu=shares["ucu"], ru=shares["ru"])
    sort(one, one)
    loading.check_on_one_device("a model that trains")
    console, name = Console(highlight=False), loading.name
    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    model, tokenizer, alignment = aligned(console, loading, out, seconds, fresh=fresh)
    heading(console, "2/5", "Score every unit: importance on refusals and on ordinary answers")
    loaders = {
        kind: make_loader(source, tokenizer, batch_size=BATCH) for kind, source in DATA.items()
    }
    scores = {kind: _scored(console, model, kind, own, out) for kind, own in loaders.items()}

    # All units are ranked together, by z-scores per module: on SmolLM2-135M the groups separate
    # safety from utility best so, and layers may differ in how many units they give.
    heading(console, "3/5", "Sort them into four groups")
    groups = sort(scores["safety"], scores["utility"])
    groups.save(out / "groups")
    console.print("all units ranked together, by z-scores per module")
    console.print(groups_table(groups))

    heading(console, "4/5", "Take each group out, and as many random units")
    rows = []
    # The intact model, and each group with its control of random units.
    with bar(console, "ablating", 1 + 2 * len(GROUPS)) as advance:
        for row in ablations(measures(model, tokenizer), groups, GROUPS, random=True):
            rows.append(row)
            advance(len(rows))
    console.print(ablation_table(rows))

    heading(console, "5/5", "Speed beside the model's own forward pass")
    result = {
        "model": name,
        "ssah": ssah.__version__,
        **timing.facts(),
        "device": str(next(model.parameters()).device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "alignment": alignment,
        "scores": {kind: _summary(attribution) for kind, attribution in scores.items()},
        "groups": _described(groups),
        "ablation": rows,
        "throughput": throughput(console, model, loaders["utility"]),
        "pictures": {
            "scores": str(plot_scores(groups, out / "scores.png", f"{name}: units by importance")),
            "ablation": str(
                plot_ablations(rows, out / "ablation.png", f"{name}: each group ablated")
            ),
        },
        "seconds": time.perf_counter() - start,
    }
    (out / "demo.json").write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
    console.print(facts_table("Written", _files(out, result)))
    return result


def _scored(
    console: Console, model: PreTrainedModel, kind: str, loader: Loader, out: Path
) -> Attribution:
    """Scores of all units on one kind of rows, kept in ``out``."""
    console.print(f"{kind}: {DATA[kind]}, the tokens of the responses")
    attribution = attribute(model, loader, progress=True)
    attribution.save(out / kind)
    return attribution


def _files(out: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    """What a demonstration has written, and how long it took, as its last table says it."""
    return {
        "pictures": ", ".join(result["pictures"].values()),
        "all figures": out / "demo.json",
        "scores, groups": f"{out / 'safety'}, {out / 'utility'}, {out / 'groups'}",
        "aligned model": out / "aligned" if result["alignment"] else "none: --seconds 0",
        "time": f"{result['seconds']:.0f} s",
    }


def _summary(attribution: Attribution) -> dict[str, Any]:
    return {
        "metric": attribution.metric,
        "tokens": attribution.tokens,
        "tokens_counted": max(attribution.count.values()),  # an expert sees fewer of them
        "units": sum(len(score) for score in attribution.scores.values()),
        "data_fingerprint": attribution.data_fingerprint,
    }


def _described(groups: UnitGroups) -> dict[str, Any]:
    how = {"shares": groups.shares, "scope": groups.scope, "normalize": groups.normalize}
    return {**how, **groups.summary(), "layers": layers(groups)}
