"""``ssah bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ssah.cli.running import Result

ORDER = 150


def bench(
    quick: Annotated[bool, typer.Option("--quick", help="One small case, under a minute.")] = False,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="For results.")] = Path(
        "bench_out"
    ),
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch; default: all.")] = None,
) -> Result:
    """Measure every operator and `attribute` here, beside eager PyTorch and torch.compile.

    Example: `ssah bench --quick`
    """
    from ssah.studies.bench import run_bench

    return Result(run_bench(out, quick=quick, threads=threads))
