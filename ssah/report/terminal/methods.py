"""The tables of ``ssah methods``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from ssah.report.terminal.tables import as_data, facts_table, new_table


def methods_table(every: Sequence[Mapping[str, Any]]) -> Table:
    """One line a method."""
    table = new_table("Methods", ("method", "when"), ())
    table.add_column("what it does")
    for each in every:
        table.add_row(*(as_data(each[key]) for key in ("name", "stage", "does")))
    return table


def method_tables(about: Mapping[str, Any]) -> Iterator[Table]:
    """All that there is to know of one method, and its settings."""
    stated = ("does", "paper", "equation", "stage", "gives")
    facts = {key: about[key] for key in stated}
    facts["needs"] = "; ".join(f"{need}: {what}" for need, what in about["needs"].items())
    facts["departures"] = " ".join(about["departures"]) or "none"
    yield facts_table(about["name"], facts | {key: about[key] for key in ("control", "published")})
    table = new_table("Settings", ("setting",), ("default",))
    table.add_column("what it is")
    for each in about["settings"]:
        table.add_row(*(as_data(each[key]) for key in ("name", "default", "help")))
    yield table
