"""``ssah transfer``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ssah.cli.running import Result

ORDER = 70


def transfer(
    before: Annotated[
        Path, typer.Argument(metavar="GROUPS_BEFORE", help="What `ssah classify` saved.")
    ],
    after: Annotated[
        Path, typer.Argument(metavar="GROUPS_AFTER", help="The same of the trained model.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Keep numbers and picture.")
    ] = None,
    title: Annotated[str, typer.Option(help="Over the picture.")] = "Attribute transfer",
) -> Result:
    """Show which units changed their group when the model was trained.

    Example: `ssah transfer runs/groups runs/groups_tuned --out runs/transfer`
    """
    from ssah import transfer as compare
    from ssah.groups import UnitGroups
    from ssah.report.terminal import facts_table, transfer_table
    from ssah.studies import run_transfer, transfer_summary

    if out is None:  # a look at two folders, which leaves nothing behind
        groups = UnitGroups.load(before), UnitGroups.load(after)
        found = transfer_summary(compare(*groups), *groups)
    else:
        found = {"out": str(out), **run_transfer(before, after, out, title=title)["result"]}
    facts = {
        "units": f"{found['units']:,}, ranked per {found['scope']}",
        "before": f"{before} ({found['models']['before']})",
        "after": f"{after} ({found['models']['after']})",
        **({} if out is None else {"saved to": out}),  # no line that says "None"
    }
    return Result(found, (transfer_table(found), facts_table("Transfer", facts)))
