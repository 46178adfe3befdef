"""``ssah refusals``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ssah.cli.running import Result, quiet_threads
from ssah.cli.shared import FastWeights, Model, Rows
from ssah.studies.refusals import RefusalSettings

ORDER = 5


def refusals(
    model: Model,
    requests: Annotated[
        list[str],
        typer.Option(
            "--requests",
            help="Harmful: .txt, CSV, JSONL or `builtin:...`, `FILE[a:b]`; may be repeated.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help="JSONL for the refusals.")
    ],
    settings: RefusalSettings,
    weights: FastWeights,
    rows: Rows,
) -> Result:
    """Write a model's own refusals, to score its units on.

    Example: `ssah refusals runs/aligned --requests builtin:safety --out own.jsonl`, then
    `ssah attribute runs/aligned --data own.jsonl --out runs/safety`

    An answer is written where judges of two kinds call it a refusal; any other is forgotten. An
    interrupted run goes on when the same command is given again.
    """
    quiet_threads()
    from ssah.report.terminal import facts_table
    from ssah.studies.refusals import run_refusals

    record = run_refusals(weights.loading(model, rows), out, settings, requests=requests)
    found = record["result"]
    facts = {
        "requests": found["requests"],
        "kept": f"{found['kept']}, {found['texts']} different texts",
        **{f"dropped: {reason}": count for reason, count in found["dropped"].items()},
        "saved to": out,
    }
    return Result({"out": str(out), **found}, (facts_table("Refusals", facts),))
