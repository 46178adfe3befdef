"""``ssah evaluate``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ssah.cli.reading import reading_rows
from ssah.cli.support import (
    Device,
    Dtype,
    Json,
    MaxLength,
    Model,
    Out,
    RemoteCode,
    Result,
    reporting,
)

__all__ = ["register"]

_DATA, _MEASURING, _NONE = "Data", "Measuring", "none"


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("evaluate")(reporting(reading_rows(evaluate)))


def evaluate(
    model: Model,
    out: Out,
    reading: Any,
    requests: Annotated[
        list[str] | None,
        typer.Option(
            "--requests",
            help="Harmful: .txt, CSV, JSONL, `FILE[a:b]`, [`builtin:safety_eval`]; may repeat.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    over_refusal: Annotated[
        str,
        typer.Option(
            "--over-refusal",
            help="Harmless but dangerous-looking, or `none`.",
            rich_help_panel=_DATA,
        ),
    ] = "builtin:overrefusal",
    benign: Annotated[
        str,
        typer.Option("--benign", help="Ordinary instructions, or `none`.", rich_help_panel=_DATA),
    ] = "builtin:utility_eval",
    utility: Annotated[
        str,
        typer.Option(
            "--utility",
            help="Rows with answers, for loss and perplexity, or `none`.",
            rich_help_panel=_DATA,
        ),
    ] = "builtin:utility_eval",
    judge: Annotated[
        list[str] | None,
        typer.Option(
            "--judge",
            help="`qi2023`, [`wei2024`], `zou2023`, FILE.json, `hf:MODEL`, `openai:URL#MODEL` or "
            "`python:module.function`; may be repeated.",
            rich_help_panel=_MEASURING,
        ),
    ] = None,
    system_prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--system-prompt",
            help="A text, a .txt file, or [`none`]: what the chat template says by itself; may be "
            "repeated.",
            rich_help_panel=_MEASURING,
        ),
    ] = None,
    ablate: Annotated[
        list[str] | None,
        typer.Option(
            "--ablate",
            metavar="DIR:GROUP",
            help="Also without these units; `DIR:ru:0.01`: those most like the group, as a "
            "fraction of all units; `...:random`: as many random ones. May be repeated.",
            rich_help_panel=_MEASURING,
        ),
    ] = None,
    intact: Annotated[
        str | None,
        typer.Option(
            "--intact",
            metavar="MODEL",
            help="Scores coherence; default: MODEL itself, nothing ablated.",
            rich_help_panel=_MEASURING,
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            help="Multiple-choice task of lm-eval; may be repeated.",
            rich_help_panel=_MEASURING,
        ),
    ] = None,
    task_folder: Annotated[
        Path | None,
        typer.Option(
            "--task-folder",
            metavar="DIR",
            help="YAML files of further tasks.",
            rich_help_panel=_MEASURING,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int,
        typer.Option("--max-new-tokens", min=1, help="Of an answer.", rich_help_panel=_MEASURING),
    ] = 64,
    level: Annotated[
        float,
        typer.Option("--level", help="Of the intervals.", rich_help_panel=_MEASURING),
    ] = 0.95,
    seed: Annotated[int, typer.Option("--seed", help="Of random units and the bootstrap.")] = 0,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Sequences run at a time.")
    ] = 16,
    max_length: MaxLength = 512,
    dtype: Annotated[
        Dtype, typer.Option("--dtype", help="`auto`: what is faster here.")
    ] = Dtype.auto,
    device: Device = "auto",
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> Result:
    """Measure attack success with its controls: babble, over-refusal, ordinary answers, loss.

    Example: `ssah evaluate runs/aligned --requests harmful.txt --judge wei2024
    --ablate runs/groups:scu --ablate runs/groups:scu:random --out runs/evaluation`

    Answers are judged and forgotten. An interrupted evaluation goes on when the same command is
    given again.
    """
    # Threads that wait leave their core to others; it must be said before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from ssah.report.terminal.evaluation import evaluation_tables
    from ssah.studies.evaluate.run import evaluate as run
    from ssah.studies.evaluate.settings import EvaluateSettings
    from ssah.studies.loading import Loading

    settings = EvaluateSettings(
        judges=tuple(judge or ("wei2024",)),
        system_prompts=tuple(map(_system_prompt, system_prompt or (_NONE,))),
        ablations=tuple(ablate or ()),
        tasks=tuple(task or ()),
        task_folder=None if task_folder is None else str(task_folder),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        max_length=max_length,
        level=level,
        seed=seed,
    )
    record = run(
        Loading(model, dtype.value, device, trust_remote_code, reading),
        out,
        settings,
        requests=requests or "builtin:safety_eval",
        over_refusal=None if over_refusal == _NONE else over_refusal,
        benign=None if benign == _NONE else benign,
        utility=None if utility == _NONE else utility,
        intact=intact,
    )
    return Result(record, tuple(evaluation_tables(record, out)))


def _system_prompt(text: str) -> str | None:
    if text == _NONE:
        return None
    if text.endswith(".txt"):
        path = Path(text)
        if not path.is_file():
            raise FileNotFoundError(f"system prompt is {text!r}, which is no file")
        return path.read_text(encoding="utf-8-sig").strip()
    return text
