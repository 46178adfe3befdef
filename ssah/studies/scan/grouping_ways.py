"""Which way of grouping separates safety from utility best: every scope, normalisation, tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any, get_args

from ssah.choices import Counted, Normalize, Scope
from ssah.studies.study import grouped

if TYPE_CHECKING:
    from ssah.data import Row
    from ssah.studies.scan.curves import Curves

_TOKENS: tuple[Counted, ...] = get_args(Counted)
_RANKINGS: list[tuple[Scope, Normalize]] = list(product(get_args(Scope), get_args(Normalize)))
WAYS = len(_TOKENS) * len(_RANKINGS)  # how many are compared

_ASR, _MARGIN = "coherent ASR", "refusal margin"
_FALL = {_ASR: "raises the ASR among coherent answers", _MARGIN: "lowers the refusal margin"}


def compare(curves: Curves, rows: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """Ablate SCU at a few shares under every scope, normalisation and choice of tokens.

    The SCU are chosen after as many RU as the scan chose. What a way takes of safety is the rise of
    the ASR among coherent answers where requests are answered, else the fall of the margin.

    Args:
        curves: of the scan: its RU are chosen; ``compare_shares`` and ``tolerance`` of its settings
            matter.
        rows: ``"safety"`` and ``"utility"`` rows to score units on.

    Returns:
        ``criterion``, ``by`` (what is compared) and ``ways``, best first: ``scope``, ``normalize``,
        ``tokens``, ``taken`` (the criterion), ``share`` (where, or None) and ``points``, each what
        ``curves.plain`` says, and what it has ``taken``.
    """
    by = _ASR if curves.evaluation.asked else _MARGIN
    intact, ru = curves.plain(curves.intact), curves.shares.get("ru", 0.0)
    ways: list[dict[str, Any]] = []
    for tokens in _TOKENS:
        scores = curves.study.scores(rows, tokens)
        # The same scores serve all rankings: only the choice of tokens needs another pass.
        rankings = [
            replace(curves.settings, scope=scope, normalize=normalize)
            for scope, normalize in _RANKINGS
        ]
        units = {
            f"compare-{tokens}-{own.scope}-{own.normalize}-{share:g}": (
                share,
                grouped(own, scores, scu=share, ru=ru)["scu"],
            )
            for own in rankings
            for share in own.compare_shares
        }
        measured = iter(curves.measured(units))
        for own in rankings:
            plain = [curves.plain(next(measured)) for _ in own.compare_shares]
            points = [{**point, "taken": _taken(by, intact, point)} for point in plain]
            # A share that costs utility takes safety only as any damage does.
            kept = [point for point in points if point["utility_kept"]]
            best = max(kept, key=lambda point: point["taken"], default=None)
            ways.append(
                {
                    "scope": own.scope,
                    "normalize": own.normalize,
                    "tokens": tokens,
                    "taken": 0.0 if best is None else best["taken"],
                    "share": None if best is None else best["share"],
                    "points": points,
                }
            )
    ways.sort(key=lambda way: -way["taken"])
    criterion = (
        "Of the SCU shares whose ablation raises the utility loss by less than "
        f"{curves.settings.tolerance:g} nats, the one that {_FALL[by]} most; ways of grouping are "
        "ranked by that (0 where no share keeps utility)."
    )
    return {"criterion": criterion, "by": by, "ways": ways}


def _taken(by: str, intact: Mapping[str, Any], point: Mapping[str, Any]) -> float:
    if by == _ASR:
        return float(point["asr_coherent"] - intact["asr_coherent"])
    return float(intact["refusal_margin"] - point["refusal_margin"])
