"""The tables of ``ssah compare``: each method above its control, at most 100 columns wide."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from ssah.report.comparison import Purpose, by_purpose, judges_of, not_run
from ssah.report.terminal.tables import as_data, facts_table, new_table

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_DASH = "-"  # where there is nothing to tell
_STYLES = {"yes": "green", "no": "bold red", "undecided": "yellow"}


def compare_tables(record: Mapping[str, Any], out: Path) -> Iterator[RenderableType]:
    """A table for each purpose, the recommendation, and what was not run.

    Args:
        record: of a comparison.
        out: folder of the run.
    """
    result = record["result"]
    for purpose, rows in by_purpose(result):
        yield _table(result, purpose, rows)
    recommended = result["recommendation"]
    yield Text(recommended["sentence"], style="bold")
    # A reason may name a file of the user's: it is shown as it is.
    missing = {as_data(name): reason for name, _, reason in not_run(result)}
    if missing:
        yield facts_table("Not run", missing)
    facts = {
        "ASR": f"under {judges_of(result)[0]}, with its 95 % interval",
        "over": "over-refusal: the share of harmless requests that are refused",
        "utility, task": "losses on held-out answers, nats per token",
        "less control": "the difference to the control of the same size, in points",
        "beats it": f"{recommended['rule']} It stands in brackets where a method is undecided.",
        "saved to": out,
    }
    yield facts_table("Comparison", facts)


def _table(result: Mapping[str, Any], purpose: Purpose, rows: Sequence[Mapping[str, Any]]) -> Table:
    table = new_table(
        purpose.title,
        ("method",),
        ("ASR", "over", "utility", "task", "less control", "beats it"),
    )
    table.add_row(Text("aligned model", style="italic"), *_measured(result["intact"]), "", "")
    if purpose.tuned:
        table.add_row(
            Text("nothing kept", style="italic"), *_measured(result["tuned"]["mean"]), "", ""
        )
    for row in rows:
        table.add_section()
        beats = row["verdict"]["beats_control"]
        smallest = row["verdict"]["smallest_difference"]
        # What is undecided says next to nothing without the difference that could have been seen.
        shown = beats if beats != "undecided" or not smallest else f"{beats} ({100 * smallest:.0f})"
        table.add_row(
            as_data(row["method"]),
            *_measured(row["mean"]),
            _points((row["differences"].get("control") or {}).get(purpose.of)),
            Text(shown, style=_STYLES[beats]),
        )
        if row["control"] is not None:
            table.add_row("  its control", *_measured(row["control"]["mean"]), "", "", style="dim")
    return table


def _measured(model: Mapping[str, Any]) -> list[str]:
    refused = model.get("over_refusal")
    low, high = (100 * end for end in model["asr_interval"])
    return [
        f"{100 * model['asr']:.0f} ({low:.0f}-{high:.0f})",
        _DASH if refused is None else f"{100 * refused:.0f}",
        *(
            _DASH if model.get(key) is None else f"{model[key]:.3f}"
            for key in ("utility_loss", "task_loss")
        ),
    ]


def _points(difference: Mapping[str, Any] | None) -> str:
    if difference is None:
        return _DASH
    low, high = (100 * end for end in difference["interval"])
    return f"{100 * difference['value']:+.0f} ({low:+.0f} {high:+.0f})"
