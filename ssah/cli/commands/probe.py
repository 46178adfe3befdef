"""``ssah probe``."""

from __future__ import annotations

from typing import Annotated

import typer

from ssah.cli.running import Result, quiet_threads
from ssah.cli.shared import BatchSize, MaxLength, Model, Out, Rows, Weights

ORDER = 80


def probe(
    model: Model,
    out: Out,
    *,
    beside: Annotated[
        str | None, typer.Option("--beside", metavar="OTHER", help="Compare with this model.")
    ] = None,
    requests: Annotated[
        list[str] | None,
        typer.Option(
            "--requests", help="Harmful: .txt, JSONL or built-in [`builtin:safety_eval`]; repeat."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Generated with each version.")] = 10,
    refusal: Annotated[
        str | None, typer.Option(help="Start of a refusal; default: that of the margin.")
    ] = None,
    compliance: Annotated[str | None, typer.Option(help="Start of a compliance.")] = None,
    batch_size: BatchSize = 8,
    max_length: MaxLength = 512,
    weights: Weights,
    rows: Rows,
) -> Result:
    """Measure whether hidden states are nearer to a refusal's or to a compliance's, per layer.

    Example: `ssah probe runs/aligned --beside smollm2 --out runs/probe`
    """
    quiet_threads()
    from ssah.evaluation import COMPLIANCE, REFUSAL
    from ssah.report.terminal.probe import probe_tables
    from ssah.studies.probe import run_probe

    record = run_probe(
        out,
        weights.loading(model, rows),
        requests or ["builtin:safety_eval"],
        beside=beside,
        tokens=tokens,
        refusal=REFUSAL if refusal is None else refusal,
        compliance=COMPLIANCE if compliance is None else compliance,
        batch_size=batch_size,
        max_length=max_length,
    )
    return Result({"out": str(out), **record["result"]}, tuple(probe_tables(record, out)))
