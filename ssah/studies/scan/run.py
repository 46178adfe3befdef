"""Group sizes: safety and utility against the share ablated, and the shares to take.

Groups are chosen in the order of `ssah.classify`, each with the shares chosen before it, so that
the shares chosen give exactly the groups that were measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ssah.groups import NORMALIZATIONS, SCOPES
from ssah.models import move, weights_hash
from ssah.report.pictures.scan import plot_compare, plot_scan
from ssah.storage import check_free
from ssah.studies.inputs import TOKENS, Loading, Sources, score
from ssah.studies.measuring import UTILITY, Evaluation
from ssah.studies.run import Run
from ssah.studies.scan.curves import ORDER, Curves
from ssah.studies.scan.settings import ScanSettings
from ssah.studies.scan.ways import compare
from ssah.studies.steps import Steps

__all__ = ["RULE", "ScanSettings", "scan"]

KIND = "scan"
RULE = (
    "From high shares to low, as in arXiv 2410.10862: the largest RU share at which utility and "
    "safety are kept, the largest SCU share at which utility is kept, the largest UCU share at "
    "which safety is kept. Utility is kept where the utility loss rises by less than the "
    "tolerance; safety where the share of requests with a positive refusal margin falls by at most "
    "the safety tolerance and the ASR, where it was measured, rises by at most as much."
)


def scan(
    loading: Loading,
    out: Path,
    settings: ScanSettings,
    *,
    safety: str,
    utility: str,
    requests: Sequence[str],
    utility_eval: str,
) -> dict[str, Any]:
    """Measure the curves, choose the shares, and save the groups to ``out/groups``.

    Args:
        loading: of the model, which should be aligned.
        out: folder of the run.
        settings: what is measured.
        safety, utility: rows to score units on, as ``ssah.data.load_rows`` takes them.
        requests: harmful requests, for margin and ASR, as ``ssah.data.load_requests`` takes them.
        utility_eval: rows for the utility loss; neither these nor the requests should be among the
            rows that units are scored on.

    Returns:
        the record of the run; ``result`` has ``intact``, ``curves``, ``chosen``, ``claims`` and
        ``compare``.
    """
    check_free(out)
    sources = Sources(loading.reading)
    rows = {"safety": sources.rows("safety", safety), "utility": sources.rows("utility", utility)}
    asked = sources.requests("requests", requests)
    held_out = sources.rows("utility_eval", utility_eval)
    model, tokenizer = loading("auto")
    run = Run(
        out,
        KIND,
        {**loading.settings(), "weights": weights_hash(model), **asdict(settings)},
        sources.record,
    )
    evaluation = Evaluation(
        tokenizer,
        asked,
        {UTILITY: held_out},
        asked=settings.asr,
        judges=settings.judges,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        max_length=settings.max_length,
        overlong=loading.reading.overlong,
    )
    with Steps(run, _steps(settings)) as steps:
        dtype, _ = loading.precision(steps, model.device)
        scores = score(
            steps,
            move(model, getattr(torch, dtype)),
            tokenizer,
            rows,
            tokens=settings.tokens,
            batch_size=settings.batch_size,
            max_length=settings.max_length,
            overlong=loading.reading.overlong,
        )
        curves = Curves(steps, model, evaluation, settings, scores)
        chosen, claims = _measure(curves, settings)
        compared = compare(curves, rows) if settings.compare else None
    groups = curves.groups()
    groups.save(out / "groups")
    result = {
        "dtype": dtype,
        "units": sum(groups.sizes.values()),
        "intact": curves.plain(curves.intact),
        "curves": {
            **{
                group: [curves.plain(points[share]) for share in sorted(points)]
                for group, points in curves.points.items()
            },
            "random": [
                {**curves.plain(point), "seed": settings.seed + draw}
                for share in sorted(curves.random)
                for draw, point in enumerate(curves.random[share])
            ],
        },
        "rule": RULE,
        "chosen": chosen,
        "claims": claims,
        "compare": compared,
    }
    name = loading.name
    pictures = [plot_scan(result, out / "scan.png", f"{name}: ablating a share of the units")]
    if compared is not None:
        path, title = out / "compare.png", f"{name}: ways of grouping"
        pictures.append(plot_compare(compared, settings.tolerance, path, title))
    return run.finish(result, pictures)


def _measure(
    curves: Curves, settings: ScanSettings
) -> tuple[dict[str, dict[str, Any] | None], list[dict[str, Any]]]:
    """All points of all curves; returns the points chosen and the claims."""
    chosen: dict[str, dict[str, Any] | None] = {}
    for group in ORDER:
        for share in settings.ru_shares if group == "ru" else settings.shares:
            curves.measure(group, share)
        chosen[group] = curves.choose(group)
    for group, shares in (("scu", settings.shares), ("ru", settings.ru_shares)):
        for share in shares:
            curves.measure_random(group, share)
    # Where no share keeps what it should, the smallest comes closest.
    share = curves.shares.get("scu", min(settings.shares))
    curves.measure("ru", share)
    return chosen, curves.claims(share, curves.shares.get("ru", min(settings.ru_shares)))


def _steps(settings: ScanSettings) -> int:
    small, large = len(set(settings.shares)), len(set(settings.ru_shares))
    points = 2 + 2 * small + large + settings.draws * len({*settings.shares, *settings.ru_shares})
    scored = 0
    if settings.compare:
        scored = 2 * (len(TOKENS) - 1)
        ways = len(SCOPES) * len(NORMALIZATIONS) * len(TOKENS)
        points += ways * len(settings.compare_shares)
    return 3 + scored + (1 + 2 * points if settings.asr else points)
