"""The tables of ``ssah delta --show``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.text import Text

from ssah.report.colours import COLOURS
from ssah.report.terminal.tables import as_data, new_table

if TYPE_CHECKING:
    from rich.table import Table


def delta_tables(found: Mapping[str, Any]) -> Iterator[Table]:
    """How large a delta is by part of the model and by layer, and what groups of units have."""
    yield _parts(found)
    yield _layers(found)
    if found["groups"]:
        yield _groups(found)


def _parts(found: Mapping[str, Any]) -> Table:
    table = new_table(
        f"What training changed, from {as_data(found['base'])} to {as_data(found['tuned'])}",
        ("part",),
        ("parameters", "changed", "||delta||", "/ ||base||", "of ||delta||²"),
    )
    total = found["total"]
    for name, size in found["parts"].items():
        table.add_row(name, *_size(size, total))
    table.add_section()
    table.add_row("all", *_size(total, total))
    return table


def _size(size: Mapping[str, Any], total: Mapping[str, Any]) -> tuple[str, ...]:
    # The share is of squares, which add up over parts; norms do not.
    n = size["parameters"]
    share = size["delta_sq"] / total["delta_sq"] if total["delta_sq"] else 0.0
    return (
        f"{n:,}",
        f"{size['changed'] / n:.1%}" if n else "-",
        f"{size['norm']:.4g}",
        f"{size['relative']:.3%}",
        f"{share:.1%}",
    )


def _layers(found: Mapping[str, Any]) -> Table:
    # Embedding and head are in no layer.
    parts = [part for part in found["parts"] if any(part in row for row in found["layers"])]
    table = new_table("||delta|| / ||base|| by layer", (), ("layer", *parts))
    for row in found["layers"]:
        shown = (f"{row[part]['relative']:.3%}" if part in row else "-" for part in parts)
        table.add_row(str(row["layer"]), *shown)
    return table


def _groups(found: Mapping[str, Any]) -> Table:
    table = new_table(
        "Whose weights changed; beside it as many random units of each module",
        ("group",),
        ("units", "of parameters", "of ||delta||²", "random units", "± sd"),
    )
    for name, size in found["groups"].items():
        drawn = size["units"] > 0  # what no unit owns has no control
        table.add_row(
            Text(name.upper(), style=COLOURS[name]) if name in COLOURS else name,
            f"{size['units']:,}" if drawn else "-",
            f"{size['parameters']:.2%}",
            f"{size['share']:.2%}",
            f"{size['random']:.2%}" if drawn else "-",
            f"{size['random_sd']:.2%}" if drawn else "-",
        )
    return table
