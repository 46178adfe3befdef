"""``ssah evaluate``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ssah.cli.running import Result, quiet_threads
from ssah.cli.shared import FastWeights, Model, Out, Rows
from ssah.settings import setting
from ssah.studies import Choosing
from ssah.studies.evaluate import EvaluateSettings

ORDER = 40

_NONE = "none"  # what a user types for no such rows, and for no system message
_data = partial(setting, panel="Data")


@dataclass(frozen=True)
class EvaluatedSets:
    """The rows by which a model is evaluated."""

    requests: tuple[str, ...] = _data(
        ("builtin:safety_eval",),
        "Harmful: .txt, CSV, JSONL, `FILE[a:b]`, [`builtin:safety_eval`]; may repeat.",
    )
    over_refusal: str = _data("builtin:overrefusal", "Harmless but dangerous-looking, or `none`.")
    benign: str = _data("builtin:utility_eval", "Ordinary instructions, or `none`.")
    utility: str = _data(
        "builtin:utility_eval", "Rows with answers, for loss and perplexity, or `none`."
    )
    policy: str | None = _data(
        None,
        "Requests with `system_prompt` and `allowed` each, or CoSApien: are policies followed?",
        metavar="FILE",
    )
    letters: str | None = _data(
        None, "Multiple choice with one or several right letters: `mcq_set`.", metavar="FILE"
    )


def evaluate(
    model: Model,
    out: Out,
    *,
    sets: EvaluatedSets,
    choosing: Choosing,
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
    from ssah.report.terminal import evaluation_tables, row_tables
    from ssah.studies.evaluate import run_evaluation

    # The record has what was said, and not the name of a file that may change.
    said = tuple(map(_system_prompt, settings.system_prompts))
    record = run_evaluation(
        weights.loading(model, rows),
        out,
        replace(settings, system_prompts=said),
        requests=sets.requests,
        over_refusal=_unless_none(sets.over_refusal),
        benign=_unless_none(sets.benign),
        utility=_unless_none(sets.utility),
        intact=intact,
        choosing=choosing,
        policy=sets.policy,
        letters=sets.letters,
    )
    *tables, facts = evaluation_tables(record, out)  # the facts stand below all tables
    return Result(record, (*tables, *row_tables(record), facts))


def _unless_none(word: str | None) -> str | None:
    # A word, because an option cannot be None, and empty text is a system message too.
    return None if word == _NONE else word


def _system_prompt(text: str | None) -> str | None:
    """What was said, or what the file has that was named; None: no system message."""
    if text is None or not text.endswith(".txt"):
        return _unless_none(text)
    path = Path(text)
    if not path.is_file():
        raise FileNotFoundError(f"system prompt is {text!r}, which is no file")
    return path.read_text(encoding="utf-8-sig").strip()  # editors of Windows put a mark before it
