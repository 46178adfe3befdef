"""``ssah scan`` and ``ssah stability``."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from ssah.cli.many import many_values
from ssah.cli.reading import reading_rows
from ssah.cli.support import (
    Device,
    Dtype,
    Json,
    Model,
    Normalize,
    RemoteCode,
    Result,
    Scope,
    reporting,
)

__all__ = ["register"]


class Counted(str, Enum):
    """As ``ssah.choices.Counted``."""

    labels = "labels"
    all = "all"


_ROWS = "File, `builtin:safety` or the like, or hub id; `FILE[a:b]`: rows a to b - 1."
_REQUESTS = "Harmful requests: .txt, CSV, JSONL or `builtin:...`, `FILE[a:b]`; may be repeated."
_DATA, _GROUPS, _MEASURING = "Data", "Groups", "Measuring"

Folder = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder of the run.")]
Safety = Annotated[
    str, typer.Option("--safety", help=f"Scored for safety: {_ROWS}", rich_help_panel=_DATA)
]
Utility = Annotated[
    str, typer.Option("--utility", help="Scored for utility: likewise.", rich_help_panel=_DATA)
]
Requests = Annotated[list[str], typer.Option("--requests", help=_REQUESTS, rich_help_panel=_DATA)]
UtilityEval = Annotated[
    str, typer.Option("--utility-eval", help="Rows for the utility loss.", rich_help_panel=_DATA)
]
ScopeOption = Annotated[
    Scope, typer.Option("--scope", help="What is ranked together.", rich_help_panel=_GROUPS)
]
NormalizeOption = Annotated[
    Normalize,
    typer.Option("--normalize", help="Scores of a module.", rich_help_panel=_GROUPS),
]
TokensOption = Annotated[
    Counted,
    typer.Option("--tokens", help="Positions scored; `labels`: response.", rich_help_panel=_GROUPS),
]
Judges = Annotated[
    list[str] | None,
    typer.Option(
        "--judge",
        help="Of the answers; may be repeated: the first decides.",
        rich_help_panel=_MEASURING,
    ),
]
NewTokens = Annotated[
    int,
    typer.Option("--max-new-tokens", min=1, help="Of an answer.", rich_help_panel=_MEASURING),
]
BatchSize = Annotated[
    int, typer.Option("--batch-size", min=1, help="Measured at a time.", rich_help_panel=_MEASURING)
]
MaxLength = Annotated[
    int,
    typer.Option("--max-length", min=2, help="Tokens kept of a row.", rich_help_panel=_MEASURING),
]
DtypeOption = Annotated[
    Dtype,
    typer.Option("--dtype", help="`auto`: what is faster here.", rich_help_panel=_MEASURING),
]
Share = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Share of all units.", rich_help_panel=_GROUPS)
]
WEI = "wei2024"


def quiet_threads() -> None:
    """Let threads that wait leave their core to others; to be called before torch is imported."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def scan(
    model: Model,
    safety: Safety,
    utility: Utility,
    requests: Requests,
    utility_eval: UtilityEval,
    out: Folder,
    reading: Any,
    shares: Annotated[
        list[float] | None,
        typer.Option("--shares", help="Of SCU and UCU.", rich_help_panel=_GROUPS),
    ] = None,
    ru_shares: Annotated[
        list[float] | None, typer.Option("--ru-shares", help="Of RU.", rich_help_panel=_GROUPS)
    ] = None,
    scope: ScopeOption = Scope.model,
    normalize: NormalizeOption = Normalize.zscore,
    tokens: TokensOption = Counted.labels,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="All scopes x normalizations x tokens.", rich_help_panel=_GROUPS
        ),
    ] = False,
    compare_shares: Annotated[
        list[float] | None,
        typer.Option("--compare-shares", help="Of SCU, for that.", rich_help_panel=_GROUPS),
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option("--tolerance", min=0.0, help="Nats of utility loss that may be lost."),
    ] = 0.15,
    safety_tolerance: Annotated[
        float,
        typer.Option("--safety-tolerance", min=0.0, help="Share of refusals that may be lost."),
    ] = 0.05,
    asr: Annotated[
        int,
        typer.Option(
            "--asr",
            min=0,
            help="Requests answered at each share; 0: none.",
            rich_help_panel=_MEASURING,
        ),
    ] = 0,
    judge: Judges = None,
    max_new_tokens: NewTokens = 64,
    draws: Annotated[
        int, typer.Option("--draws", min=1, help="Sets of random units.", rich_help_panel=_GROUPS)
    ] = 1,
    seed: Annotated[int, typer.Option("--seed", help="Of the random units.")] = 0,
    batch_size: BatchSize = 16,
    max_length: MaxLength = 512,
    dtype: DtypeOption = Dtype.auto,
    device: Device = "auto",
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> Result:
    """Measure what ablating growing shares of each group costs, and choose the shares.

    Example: `ssah scan runs/aligned --safety builtin:safety --utility builtin:utility
    --requests builtin:safety_eval --utility-eval builtin:utility_eval --out runs/scan`

    The groups with the shares chosen are saved to DIR/groups. An interrupted scan goes on when the
    same command is given again.
    """
    quiet_threads()
    from ssah.report.terminal.experiments import scan_tables
    from ssah.studies.loading import Loading
    from ssah.studies.scan.run import scan as run
    from ssah.studies.scan.settings import ScanSettings

    lists = {"shares": shares, "ru_shares": ru_shares, "compare_shares": compare_shares}
    settings = ScanSettings(
        **{name: tuple(given) for name, given in lists.items() if given},
        scope=scope.value,
        normalize=normalize.value,
        tokens=tokens.value,
        tolerance=tolerance,
        safety_tolerance=safety_tolerance,
        asr=asr,
        judges=tuple(judge or (WEI,)),
        max_new_tokens=max_new_tokens,
        draws=draws,
        seed=seed,
        compare=compare,
        batch_size=batch_size,
        max_length=max_length,
    )
    record = run(
        Loading(model, dtype.value, device, trust_remote_code, reading),
        out,
        settings,
        safety=safety,
        utility=utility,
        requests=requests,
        utility_eval=utility_eval,
    )
    return Result(record, tuple(scan_tables(record, out)))


def stability(
    model: Model,
    safety: Safety,
    utility: Utility,
    out: Folder,
    reading: Any,
    sizes: Annotated[
        list[int] | None,
        typer.Option("--sizes", min=1, help="Prompts of each set; default: 16 32 64 128."),
    ] = None,
    resamples: Annotated[
        int, typer.Option("--resamples", min=1, help="Pairs of draws at each size.")
    ] = 20,
    enough: Annotated[
        float, typer.Option("--enough", help="Overlap from which on prompts suffice.")
    ] = 0.7,
    scu: Share = 0.01,
    ucu: Share = 0.01,
    ru: Share = 0.15,
    scope: ScopeOption = Scope.model,
    normalize: NormalizeOption = Normalize.zscore,
    tokens: TokensOption = Counted.labels,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the draws.")] = 0,
    max_length: MaxLength = 512,
    dtype: DtypeOption = Dtype.auto,
    device: Device = "auto",
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> Result:
    """Measure how far the groups depend on the prompts that they were found with.

    Example: `ssah stability runs/aligned --safety builtin:safety --utility builtin:utility
    --sizes 8 16 32 --out runs/stability`

    Groups from two disjoint draws of as many prompts are compared, again and again. Each row runs
    through the model once. Needs twice the largest size of rows of both kinds, and 16 bytes a unit
    and row of memory.
    """
    quiet_threads()
    from ssah.report.terminal.experiments import stability_tables
    from ssah.studies.loading import Loading
    from ssah.studies.stability.run import stability as run
    from ssah.studies.stability.settings import StabilitySettings

    settings = StabilitySettings(
        sizes=tuple(sizes or StabilitySettings.sizes),
        resamples=resamples,
        scu=scu,
        ucu=ucu,
        ru=ru,
        scope=scope.value,
        normalize=normalize.value,
        tokens=tokens.value,
        enough=enough,
        seed=seed,
        max_length=max_length,
    )
    loading = Loading(model, dtype.value, device, trust_remote_code, reading)
    record = run(loading, out, settings, safety=safety, utility=utility)
    return Result(record, tuple(stability_tables(record, out)))


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    shares = many_values("--shares", "--ru-shares", "--compare-shares")
    app.command("scan", cls=shares)(reporting(reading_rows(scan)))
    command = app.command("stability", cls=many_values("--sizes"))
    command(reporting(reading_rows(stability)))
