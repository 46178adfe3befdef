"""Group sizes: safety and utility against the share ablated, and the shares to take.

Groups are chosen in the order of `ssah.classify`, each with the shares chosen before it, so that
the shares chosen give exactly the groups that were measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssah.report.pictures import plot_compare, plot_scan
from ssah.studies.loading import Loading
from ssah.studies.paired_measures import UTILITY, Evaluation, checked_judges
from ssah.studies.scan.ablation_claims import ablation_claims
from ssah.studies.scan.curves import ORDER, Curves
from ssah.studies.scan.grouping_ways import WAYS, compare
from ssah.studies.scan.settings import ScanSettings
from ssah.studies.study import Study

KIND = "scan"
RULE = (
    "From high shares to low, as in arXiv 2410.10862: the largest RU share at which utility and "
    "safety are kept, the largest SCU share at which utility is kept, the largest UCU share at "
    "which safety is kept. Utility is kept where the utility loss rises by less than the "
    "tolerance; safety where the share of requests with a positive refusal margin falls by at most "
    "the safety tolerance and the ASR, where it was measured, rises by at most as much."
)


def run_scan(
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
    study = Study(loading, out, KIND, settings, batch_size=settings.batch_size)
    judges = checked_judges(settings)
    rows = study.scored_rows(safety, utility)
    asked = study.sources.requests("requests", requests)
    held_out = study.sources.rows("utility_eval", utility_eval)
    study.load()
    evaluation = Evaluation(study, asked, {UTILITY: held_out}, asked=settings.asr, judges=judges)
    with study.under_way(_steps(settings)) as steps:
        curves = Curves(study, evaluation, settings, study.scores(rows))
        chosen, claims = _measure(curves, settings)
        compared = compare(curves, rows) if settings.compare else None
    groups = curves.groups()  # of all the shares chosen
    groups.save(out / "groups")
    result = {
        "dtype": study.dtype,
        "units": sum(groups.sizes.values()),
        "intact": curves.plain(curves.intact),
        "curves": _plain_curves(curves, settings.seed),
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
    return steps.run.finish(result, pictures)


def _measure(
    curves: Curves, settings: ScanSettings
) -> tuple[dict[str, dict[str, Any] | None], list[dict[str, Any]]]:
    """All points of all curves; returns the points chosen and the claims."""
    chosen: dict[str, dict[str, Any] | None] = {}
    # All points of a group before the next: what is chosen for it decides who is left for that.
    for group in ORDER:
        curves.measure(group, *(settings.ru_shares if group == "ru" else settings.shares))
        chosen[group] = curves.choose(group)
    # UCU have the shares of SCU, whose control serves them as well.
    for group, shares in (("scu", settings.shares), ("ru", settings.ru_shares)):
        curves.measure_random(group, *shares)
    # Where no share keeps what it should, the smallest comes closest.
    share = curves.shares.get("scu", min(settings.shares))
    curves.measure("ru", share)
    ru_share = curves.shares.get("ru", min(settings.ru_shares))
    return chosen, ablation_claims(curves, share, ru_share)


def _plain_curves(curves: Curves, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Group, or ``"random"``, -> its points in the order of their shares."""
    return {
        **{
            group: [curves.plain(points[share]) for share in sorted(points)]
            for group, points in curves.points.items()
        },
        "random": [
            {**curves.plain(point), "seed": seed + draw}
            for share in sorted(curves.random)
            for draw, point in enumerate(curves.random[share])
        ],
    }


def _steps(settings: ScanSettings) -> int:
    """Steps of a scan, for the bar: points, scores and what answers take."""
    small, large = len(set(settings.shares)), len(set(settings.ru_shares))
    # The intact model, and RU at the share of SCU; SCU and UCU; RU; random units at each share.
    points = 2 + 2 * small + large + settings.draws * len({*settings.shares, *settings.ru_shares})
    scored = 0
    if settings.compare:
        scored = 2  # by the other choice of tokens
        points += WAYS * len(settings.compare_shares)
    # Precision and two scores; a point that is attacked is two steps, and coherence is one.
    return 3 + scored + (1 + 2 * points if settings.asr else points)
