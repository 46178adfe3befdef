"""The tables of ``ssah diagnose``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssah.report.terminal.tables import facts_table, new_table

if TYPE_CHECKING:
    from rich.console import RenderableType


def diagnosis_tables(record: Mapping[str, Any], out: Path) -> Iterator[RenderableType]:
    """Separation, overlap and gradients in a few numbers, the sweep, and where they are."""
    found = record["result"]
    table = new_table(
        "How far harmful and ordinary requests are apart",
        ("model",),
        ("largest ratio", "at layer", "of two halves", "gradient, harmful", "ordinary"),
    )
    for name, own in found["separation"].items():
        ratio = own["harmful"]["ratio"]
        gradients = found["gradients"][name]
        table.add_row(
            name,
            f"{max(ratio):.2f}",
            str(ratio.index(max(ratio))),
            f"{max(own['halves']['ratio']):.2f}",
            f"{gradients['harmful']['mean']:.3g}",
            f"{gradients['ordinary']['mean']:.3g}",
        )
    yield table
    rows = found["overlap"]
    keys = ("overlap", "random", "utility")
    means = {key: sum(own[key] for own in rows) / len(rows) for key in keys}
    yield facts_table(
        "Overlap of the change with what the base puts out most, mean over matrices",
        {
            "the change": f"{means['overlap']:.3f}",
            "random subspaces": f"{means['random']:.3f}",
            "directions of ordinary data": f"{means['utility']:.3f}",
        },
    )
    sweep = new_table(
        "From base (0) to aligned (1), and further",
        ("change",),
        ("alpha", "refusal margin", "refuses", "utility loss"),
    )
    for own in found["alphas"]:
        sweep.add_row(
            own["change"],
            f"{own['alpha']:g}",
            f"{own['refusal_margin']['mean']:+.3f}",
            f"{own['refuses']:.1%}",
            f"{own['utility_loss']:.3f}",
        )
    yield sweep
    yield facts_table("Written", {"picture": out / record["pictures"][0], "saved to": out})
