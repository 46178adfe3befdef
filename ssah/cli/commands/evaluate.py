"""``ssah evaluate``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ssah.cli.running import Result, quiet_threads
from ssah.cli.shared import FastWeights, Model, Out, Rows
from ssah.studies.evaluate.settings import EvaluateSettings

ORDER = 40

_NONE = "none"


def evaluate(
    model: Model,
    out: Out,
    *,
    requests: Annotated[
        list[str] | None,
        typer.Option(
            "--requests",
            help="Harmful: .txt, CSV, JSONL, `FILE[a:b]`, [`builtin:safety_eval`]; may repeat.",
            rich_help_panel="Data",
        ),
    ] = None,
    over_refusal: Annotated[
        str,
        typer.Option(
            "--over-refusal",
            help="Harmless but dangerous-looking, or `none`.",
            rich_help_panel="Data",
        ),
    ] = "builtin:overrefusal",
    benign: Annotated[
        str,
        typer.Option("--benign", help="Ordinary instructions, or `none`.", rich_help_panel="Data"),
    ] = "builtin:utility_eval",
    utility: Annotated[
        str,
        typer.Option(
            "--utility",
            help="Rows with answers, for loss and perplexity, or `none`.",
            rich_help_panel="Data",
        ),
    ] = "builtin:utility_eval",
    intact: Annotated[
        str | None,
        typer.Option(
            "--intact",
            metavar="MODEL",
            help="Scores coherence; default: MODEL itself, nothing ablated.",
            rich_help_panel="Measuring",
        ),
    ] = None,
    settings: EvaluateSettings,
    weights: FastWeights,
    rows: Rows,
) -> Result:
    """Measure attack success with its controls: babble, over-refusal, ordinary answers, loss.

    Example: `ssah evaluate runs/aligned --requests harmful.txt --judge wei2024
    --ablate runs/groups:scu --ablate runs/groups:scu:random --out runs/evaluation`

    Answers are judged and forgotten. An interrupted evaluation goes on when the same command is
    given again.
    """
    quiet_threads()
    from ssah.report.terminal.evaluation import evaluation_tables
    from ssah.studies.evaluate.run import evaluate as run

    said = tuple(map(_system_prompt, settings.system_prompts))
    record = run(
        weights.loading(model, rows),
        out,
        replace(settings, system_prompts=said),
        requests=requests or "builtin:safety_eval",
        over_refusal=None if over_refusal == _NONE else over_refusal,
        benign=None if benign == _NONE else benign,
        utility=None if utility == _NONE else utility,
        intact=intact,
    )
    return Result(record, tuple(evaluation_tables(record, out)))


def _system_prompt(text: str | None) -> str | None:
    if text is None or text == _NONE:
        return None
    if text.endswith(".txt"):
        path = Path(text)
        if not path.is_file():
            raise FileNotFoundError(f"system prompt is {text!r}, which is no file")
        return path.read_text(encoding="utf-8-sig").strip()
    return text
