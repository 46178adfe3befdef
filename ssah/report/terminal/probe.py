"""The tables of ``ssah probe``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssah.report.terminal.experiments import claims_text
from ssah.report.terminal.tables import facts_table, new_table

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_SHOWN = 12  # layers: more do not fit a screen


def probe_tables(record: Mapping[str, Any], out: Path) -> Iterator[RenderableType]:
    """Distances by layer of each model, what they say, and where they are."""
    found = record["result"]
    yield from map(_layers, found["models"])
    yield claims_text(found["claims"])
    yield facts_table("Written", {"picture": out / record["pictures"][0], "saved to": out})


def _layers(row: Mapping[str, Any]) -> Table:
    table = new_table(
        f"{row['model']}: cosine distance less baseline",
        (),
        ("layer", "to refusal", "to compliance", "difference", "95 % interval"),
    )
    values = row["by_layer"]
    last = len(values["difference"]) - 1
    step = max(1, -(-last // _SHOWN))
    for layer in (*range(0, last, step), last):
        low, high = values["difference_intervals"][layer]
        table.add_row(
            str(layer),
            f"{values['refusal'][layer]:+.3f}",
            f"{values['compliance'][layer]:+.3f}",
            f"{values['difference'][layer]:+.3f}",
            f"{low:+.3f} to {high:+.3f}",
        )
    return table
