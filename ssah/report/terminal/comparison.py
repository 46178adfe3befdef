"""The rows of a comparison, for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from ssah.report.terminal.tables import facts_table, new_table

if TYPE_CHECKING:
    from rich.console import RenderableType


def compare_tables(record: Mapping[str, Any], out: Path) -> Iterator[RenderableType]:
    """One row a method beside its control, and what is recommended."""
    result = record["result"]
    table = new_table(
        "Means over seeds; losses and KL in nats per token",
        ("method", "acts on"),
        ("ASR", "control", "over-refusal", "utility", "task", "KL", "beats its control"),
    )
    _add(table, "(intact)", "", result["intact"], "", "")
    _add(table, "(nothing kept)", "", result["tuned"]["mean"], "", "")
    for row in result["rows"]:
        if row["not_run"] is not None:
            table.add_row(row["method"], *[""] * 7, row["not_run"])
            continue
        control = "" if row["control"] is None else f"{row['control']['mean']['asr']:.1%}"
        verdict = row["verdict"]["beats_control"]
        _add(table, row["method"], row["subject"], row["mean"], control, verdict)
    yield table
    yield Text(result["recommendation"]["sentence"])
    yield facts_table("Written", {"everything": out})


def _add(
    table: Any, name: str, subject: str, found: Mapping[str, Any], control: str, verdict: str
) -> None:
    table.add_row(
        name,
        subject,
        f"{found['asr']:.1%}",
        control,
        f"{found['over_refusal']:.1%}",
        f"{found['utility_loss']:.3f}",
        f"{found['task_loss']:.3f}",
        f"{found['kl']:.3f}",
        verdict,
    )
