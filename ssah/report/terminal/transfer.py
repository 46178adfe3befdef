"""The table of ``ssah transfer``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.text import Text

from ssah.report import COLOURS
from ssah.report.terminal.tables import new_table

if TYPE_CHECKING:
    from rich.table import Table


def transfer_table(found: Mapping[str, Any]) -> Table:
    """How many units went from which group to which, as fractions of all units."""
    groups = found["groups"]
    table = new_table(
        "Units that went from one group (row) to another (column), in % of all units",
        ("before \\ after",),
        (*(group.upper() for group in groups), "all", "kept"),
    )
    for group, row in zip(groups, found["matrix"], strict=True):
        kept = found["kept"][group]
        table.add_row(
            Text(group.upper(), style=COLOURS[group]),
            *(
                Text(f"{share:.2%}", style="bold" if name == group else "")  # stayed: the diagonal
                for name, share in zip(groups, row, strict=True)
            ),
            f"{sum(row):.2%}",
            "-" if kept is None else f"{kept:.0%}",  # nothing was in it, so that nothing could stay
        )
    columns = [sum(column) for column in zip(*found["matrix"], strict=True)]
    table.add_section()
    table.add_row("all", *(f"{share:.2%}" for share in columns), f"{sum(columns):.0%}", "")
    return table
