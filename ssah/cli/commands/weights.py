"""``ssah weights``."""

from __future__ import annotations

import time
from dataclasses import dataclass

from ssah.choices import Tokens, WeightMetric
from ssah.cli.running import Result
from ssah.cli.shared import Data, Model, Out, PackedWeights, Rows
from ssah.settings import setting

ORDER = 15


@dataclass(frozen=True)
class WeightSettings:
    """What is scored, and how rows run through the model."""

    metric: WeightMetric = setting("snip", "Importance of a weight.")
    parameters: tuple[str, ...] = setting(
        ("*",), "Patterns of names, `*.mlp.*`; default: every matrix in the layers."
    )
    tokens: Tokens = setting("auto", "Wanda: that count; `auto`: the response.")
    split: str | None = setting(None, "Split of a hub data set.")
    limit: int | None = setting(None, "Rows read.", min=1)
    batch_size: int = setting(8, "Rows run at a time.", min=1)
    max_length: int = setting(512, "Tokens kept of a row.", min=2)


def weights(
    model: Model,
    out: Out,
    settings: WeightSettings,
    loading: PackedWeights,
    rows: Rows,
    data: Data | None = None,
) -> Result:
    """Score every single weight of a model on a data set.

    The scores go to DIR one matrix after the other, and take four bytes a weight there.
    Interrupted, wanda goes on from what DIR/unfinished keeps; the others begin anew.

    Example: `ssah weights smollm2 --data builtin:safety --metric snip --out runs/snip`
    """
    from ssah.attribution import attribute_weights, discard
    from ssah.data import Counts
    from ssah.report.terminal import facts_table

    _check_data(data, settings.metric)
    reading, counts = rows.reading(), Counts()
    source = None
    if data is not None:
        source = reading.rows(data, settings.split, settings.limit, counts)
    loaded, tokenizer = loading.load(model)
    loader = None
    if source is not None:
        sizes = {"batch_size": settings.batch_size, "max_length": settings.max_length}
        loader = reading.loader(source, tokenizer, counts, **sizes)
    unfinished = out / "unfinished"
    start = time.perf_counter()
    scores = attribute_weights(
        loaded,
        loader,
        metric=settings.metric,
        parameters=settings.parameters,
        tokens=settings.tokens,
        out=out,
        progress=True,
        resume_dir=unfinished if settings.metric == "wanda" else None,
    )
    discard(unfinished)
    found = {
        "out": str(out),
        "data": data,
        "model": scores.model_name,
        "metric": scores.metric,
        "parameters": len(scores.scores),
        "weights": sum(score.numel() for score in scores.scores.values()),
        "count": scores.count,
        "seconds": time.perf_counter() - start,
        "weights_hash": scores.weights_hash,
        "data_fingerprint": scores.data_fingerprint,
    }
    unit = "tokens" if scores.metric == "wanda" else "examples"
    facts = {
        "model": scores.model_name,
        "weights": f"{found['weights']:,} in {found['parameters']} matrices",
        "metric": scores.metric + (f", over {scores.count:,} {unit}" if scores.count else ""),
        "time": f"{found['seconds']:.1f} s",
        "saved to": out,
    }
    return Result(found, (facts_table("Scores of weights", facts),))


def _check_data(data: str | None, metric: str) -> None:
    """Refuse data that nobody looks at, and none where some is needed: before a model is loaded."""
    if (data is None) != (metric == "magnitude"):
        raise ValueError("--data is for every metric but magnitude, which sees no data")
