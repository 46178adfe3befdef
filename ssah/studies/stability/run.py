"""Stability: would other prompts have given the same groups, and how many suffice?

Moments are kept row by row, so that each set of rows is passed through the model once, however many
draws of it are compared. See `draws` for what is compared.
"""

from __future__ import annotations

import shutil
from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ssah.data import DataError, Encoded
from ssah.groups import GROUPS
from ssah.report.pictures import plot_stability
from ssah.studies.loading import Loading
from ssah.studies.stability.draws import Draws
from ssah.studies.stability.row_moments import row_moments
from ssah.studies.stability.settings import StabilitySettings
from ssah.studies.study import Study

KIND = "stability"
MOMENTS = "moments"  # folder of a run


def run_stability(
    loading: Loading, out: Path, settings: StabilitySettings, *, safety: str, utility: str
) -> dict[str, Any]:
    """Measure how far groups and scores depend on which prompts they were taken from.

    Args:
        loading: of the model.
        out: folder of the run.
        settings: what is measured.
        safety, utility: rows to draw from, as ``ssah.data.load_rows`` takes them.

    Returns:
        the record of the run; ``result`` has ``sizes`` (per size: ``groups``, ``spearman``) and
        ``suffices`` (per group the smallest size that suffices, or None).

    Raises:
        DataError: a set has fewer prompts than twice the largest size.
    """
    study = Study(loading, out, KIND, settings, batch_size=1)
    rows = study.scored_rows(safety, utility)
    # A set has no more prompts than rows: this much is known before the model is loaded.
    _check_enough(settings, {role: range(len(own)) for role, own in rows.items()})
    study.load()
    examples = {role: study.encoded(role, own, settings.max_length) for role, own in rows.items()}
    prompts = {role: [_prompt(example) for example in own] for role, own in examples.items()}
    _check_enough(settings, prompts)  # rows that repeat a prompt, or were left out, do not count
    with study.under_way(4 + len(settings.sizes)) as steps:
        for role, own in examples.items():
            compute = partial(_keep_moments, study, role, own)
            steps(f"moments-{role}", compute, lambda found: f"{found['rows']} rows")
        draws = Draws(out / MOMENTS, settings, prompts)
        units = steps("units", lambda: sum(draws.whole.sizes.values()), lambda units: f"{units:,}")
        sizes = [
            steps(f"size-{size}", partial(draws.compare, size), _line)
            for size in sorted(set(settings.sizes))
        ]
    if (out / MOMENTS).is_dir():  # not where a finished study is looked at
        # 16 bytes a unit and row: too much to keep beside what was found with them.
        shutil.rmtree(out / MOMENTS)
    result = {
        "dtype": study.dtype,
        "units": units,
        "rows": {role: len(own) for role, own in examples.items()},
        "prompts": {role: len(set(own)) for role, own in prompts.items()},
        "sizes": sizes,
        "suffices": {group: _suffices(group, sizes, settings.enough) for group in GROUPS},
        "rule": (
            "A number of prompts suffices for a group if the groups of two disjoint draws of that "
            f"many overlap (Jaccard) by {settings.enough:g} on average."
        ),
        "enough": settings.enough,
    }
    title = f"{loading.name}: groups from other prompts"
    return steps.run.finish(result, [plot_stability(result, out / "stability.png", title)])


def _keep_moments(study: Study, role: str, examples: Sequence[Encoded]) -> dict[str, Any]:
    with study.steps.part(role, len(examples)) as advance:
        found = row_moments(
            study.model,
            study.tokenizer,
            examples,
            tokens=study.settings.tokens,
            advance=advance,
        )
    found.save(study.out / MOMENTS / role)
    return {"rows": len(found)}


def _prompt(example: Encoded) -> tuple[int, ...]:
    """The tokens before the response: what two rows with the same prompt share."""
    labelled = (i for i, label in enumerate(example["labels"]) if label != -100)
    return tuple(example["input_ids"][: next(labelled, None)])


def _check_enough(settings: StabilitySettings, prompts: Mapping[str, Sequence[Hashable]]) -> None:
    most = max(settings.sizes)
    for role, own in prompts.items():
        if (found := len(set(own))) < 2 * most:
            raise DataError(
                f"{role} has {found} rows that differ in their prompt; two disjoint draws of "
                f"{most} need {2 * most}: give more rows, or smaller sizes"
            )


def _suffices(group: str, sizes: Sequence[Mapping[str, Any]], enough: float) -> int | None:
    """The smallest size at which the groups of two draws overlap enough."""
    enough_at = (each["size"] for each in sizes if each["groups"][group]["overlap"] >= enough)
    return next(enough_at, None)


def _line(found: Mapping[str, Any]) -> str:
    overlaps = (f"{group} {own['overlap']:.2f}" for group, own in found["groups"].items())
    return f"overlap {', '.join(overlaps)}"
