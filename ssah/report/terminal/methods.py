"""The tables of ``ssah methods``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from ssah.report.comparison import AIMS, WHEN
from ssah.report.terminal.tables import as_data, facts_table, new_table

# Everybody has these: the model that the method is for, with its tokenizer, and the built-in sets.
_AT_HAND = ("aligned", "tokenizer", "safety", "utility")


def methods_table(every: Sequence[Mapping[str, Any]]) -> Table:
    """One line a method, by when it acts: what a user must have beside the aligned model."""
    table = new_table("Methods", ("method",), ())
    table.add_column("aim")
    table.add_column("what it does")
    table.add_column("also needs")
    for stage, when in WHEN.items():
        table.add_section()
        table.add_row(Text(when, style="bold"))
        for each in (each for each in every if each["stage"] == stage):
            needs = ", ".join(need for need in each["needs"] if need not in _AT_HAND)
            table.add_row(*map(as_data, (each["name"], each["aim"], each["does"], needs)))
    table.caption = (
        "All need the aligned model, and most the built-in sets. tuned: the model fine-tuned; "
        "base: before it was aligned (--unaligned). `ssah methods NAME` says what else a word "
        "means.\n" + "; ".join(f"{aim}: {what}" for aim, what in AIMS.items()) + "."
    )
    table.caption_justify = "left"
    return table


def method_tables(about: Mapping[str, Any]) -> Iterator[Table]:
    """All that there is to know of one method, and its settings."""
    stated = ("does", "paper", "equation", "stage", "gives")
    facts = {key: about[key] for key in stated}
    facts["aim"] = f"{about['aim']}: {AIMS[about['aim']]}"
    packages = dict.fromkeys(about["packages"], "a package, of the extra ssah[train]")
    needs = {**about["needs"], **packages}
    facts["needs"] = "; ".join(f"{need}: {what}" for need, what in needs.items())
    if about["strength"] is not None:
        tried = ", ".join(f"{value:g}" for value in about["strengths"])
        place = "".join(f", in the place of {name}" for name in about["instead"])
        facts["strength"] = f"{about['strength']}{place}; worth a try: {tried}"
    facts["departures"] = " ".join(about["departures"]) or "none"
    yield facts_table(about["name"], facts | {key: about[key] for key in ("control", "published")})
    table = new_table("Settings", ("setting",), ("default",))
    table.add_column("what it is")
    for each in about["settings"]:
        table.add_row(*(as_data(each[key]) for key in ("name", "default", "help")))
    yield table
