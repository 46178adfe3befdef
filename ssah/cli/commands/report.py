"""``ssah report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ssah.cli.running import Result

ORDER = 90


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where the runs are.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Default: DIR/report.html."),
    ] = None,
    title: Annotated[str, typer.Option(help="Of the page.")] = "Safety-critical neurons",
) -> Result:
    """Write one HTML file with the tables and pictures of every run found under DIR.

    Example: `ssah report runs --out report.html`
    """
    from ssah.report.html import write_report
    from ssah.report.terminal import facts_table, new_table

    target = folder / "report.html" if out is None else out
    runs = write_report(folder, target, title=title)
    table = new_table("Runs", ("kind", "folder", "state"), ())
    for run in runs:  # of a run that is not finished, the page has half of the numbers
        table.add_row(run["kind"], run["folder"], "finished" if run["finished"] else "UNFINISHED")
    size = target.stat().st_size
    facts = {"report": target, "size": f"{size / 1e6:.1f} MB"}
    data = {"out": str(target), "bytes": size, "runs": runs}
    return Result(data, (table, facts_table("Written", facts)))
