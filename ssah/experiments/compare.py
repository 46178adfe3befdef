"""Which way of grouping separates safety from utility best: every scope, normalisation, tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

from ssah.experiments.inputs import TOKENS, score
from ssah.experiments.measuring import UTILITY, measured_line
from ssah.groups import NORMALIZATIONS, SCOPES, classify

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ssah.data import Row
    from ssah.experiments.measuring import Evaluation
    from ssah.experiments.scan import ScanSettings
    from ssah.experiments.steps import Steps

__all__ = ["CRITERION", "compare"]

CRITERION = (
    "Of the SCU shares whose ablation raises the utility loss by less than the tolerance, the one "
    "that lowers the refusal margin most; ways of grouping are ranked by that fall, nats per token "
    "(0 where no share keeps utility)."
)


def compare(
    steps: Steps,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Mapping[str, Sequence[Row]],
    evaluation: Evaluation,
    settings: ScanSettings,
    intact: Mapping[str, Any],
    ru: float,
) -> dict[str, Any]:
    """Ablate SCU at a few shares under every scope, normalisation and choice of tokens.

    Args:
        steps: of the run.
        model, tokenizer: the intact model.
        rows: ``"safety"`` and ``"utility"`` rows to score units on.
        evaluation: margin and loss are measured, not the ASR.
        settings: ``compare_shares`` and ``tolerance`` matter.
        intact: what ``evaluation.measure`` found of the intact model.
        ru: share of RU, which are chosen before the SCU.

    Returns:
        ``criterion`` and ``ways``, best first: ``scope``, ``normalize``, ``tokens``,
        ``margin_fall`` (the criterion), ``share`` (where, or None) and ``points``: per share
        ``units``, ``loss_rise``, ``margin_fall``, ``refuses``.
    """
    ways: list[dict[str, Any]] = []
    for tokens in TOKENS:
        scores = score(
            steps,
            model,
            tokenizer,
            rows,
            tokens=tokens,
            batch_size=settings.batch_size,
            max_length=settings.max_length,
        )
        for scope, normalize in product(SCOPES, NORMALIZATIONS):
            points = []
            for share in settings.compare_shares:
                units = classify(
                    scores["safety"],
                    scores["utility"],
                    scu=share,
                    ucu=0.0,
                    ru=ru,
                    scope=scope,  # type: ignore[arg-type]
                    normalize=normalize,  # type: ignore[arg-type]
                )["scu"]
                found = steps(
                    f"compare-{tokens}-{scope}-{normalize}-{share:g}",
                    partial(evaluation.measure, model, units),
                    measured_line,
                )
                points.append(
                    {
                        "share": share,
                        "units": len(units),
                        "loss_rise": _loss(found) - _loss(intact),
                        "margin_fall": intact["refusal_margin"] - found["refusal_margin"],
                        "refuses": found["refuses"],
                    }
                )
            kept = [point for point in points if point["loss_rise"] < settings.tolerance]
            best = max(kept, key=lambda point: point["margin_fall"], default=None)
            ways.append(
                {
                    "scope": scope,
                    "normalize": normalize,
                    "tokens": tokens,
                    "margin_fall": 0.0 if best is None else best["margin_fall"],
                    "share": None if best is None else best["share"],
                    "points": points,
                }
            )
    ways.sort(key=lambda way: -way["margin_fall"])
    return {"criterion": CRITERION, "ways": ways}


def _loss(measured: Mapping[str, Any]) -> float:
    return float(measured["losses"][UTILITY]["loss"])
