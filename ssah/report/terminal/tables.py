"""Tables for the terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ssah.report.colours import COLOURS, NAMES

if TYPE_CHECKING:
    from ssah.groups import UnitGroups

_GROUPS = ("scu", "ucu", "ru", "cu")  # in the order in which the documentation names them
_BAR = 8  # characters that a share of 100 % takes
_STYLE: dict[str, Any] = {
    "title_justify": "left",
    "title_style": "bold",
    "box": box.SIMPLE_HEAD,
    "collapse_padding": True,
    "pad_edge": False,
}


def as_data(value: object) -> str:
    """A name or path from outside, for a line that rich prints: never markup, never a command.

    What looks like markup is shown as it is; control characters, which a terminal would obey, are
    shown as U+FFFD.
    """
    shown = "".join("\ufffd" if unicodedata.category(c) == "Cc" else c for c in str(value))
    return escape(shown)


def new_table(title: str, left: Iterable[str], right: Iterable[str]) -> Table:
    """A table in the style of all: columns of names, then columns of numbers."""
    table = Table(title=title, **_STYLE)
    for name in left:
        table.add_column(name, no_wrap=True)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def facts_table(title: str, facts: Mapping[str, object]) -> Table:
    """Names and values, one a line."""
    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, show_header=False
    )
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, value if isinstance(value, Text) else as_data(value))
    return table


def groups_table(groups: UnitGroups) -> Table:
    """Units of each group per layer, and what the layer's SCU and UCU hold of its importance."""
    table = Table(
        title="Units per layer",
        **_STYLE,
        caption="I_S in SCU: share of the layer's safety importance that its SCU hold; "
        "I_U in UCU: the same of utility",
        caption_justify="left",
    )
    table.add_column("layer", justify="right", no_wrap=True)
    table.add_column("units", justify="right", no_wrap=True)
    for group in _GROUPS:
        table.add_column(group.upper(), justify="right", style=COLOURS[group], no_wrap=True)
    table.add_column("I_S in SCU", style=COLOURS["scu"], no_wrap=True)
    table.add_column("I_U in UCU", style=COLOURS["ucu"], no_wrap=True)
    for row in layers(groups):
        table.add_row(
            "-" if row["layer"] is None else str(row["layer"]),
            f"{row['units']:,}",
            *(f"{row[group]:,}" for group in _GROUPS),
            _bar(row["safety_in_scu"]),
            _bar(row["utility_in_ucu"]),
        )
    total = sum(groups.sizes.values())
    table.add_section()
    table.add_row("all", f"{total:,}", *(f"{len(groups[group]):,}" for group in _GROUPS))
    table.add_row("", "100 %", *(f"{groups[group].fraction:.1%}" for group in _GROUPS))
    return table


def layers(groups: UnitGroups) -> list[dict[str, Any]]:
    """The rows of ``groups.summary()["layers"]``, with what SCU and UCU hold of the importance.

    ``safety_in_scu`` is the sum of I_S over the layer's SCU divided by that over all its units, a
    fraction in [0, 1]; ``utility_in_ucu`` the same of I_U and UCU.
    """
    summary = groups.summary()
    rows = []
    for row in summary["layers"]:
        names = [m["module"] for m in summary["modules"] if m["layer"] == row["layer"]]
        held = {}
        for key, scores, group in (
            ("safety_in_scu", groups.safety, "scu"),
            ("utility_in_ucu", groups.utility, "ucu"),
        ):
            total = sum(float(scores[name].sum()) for name in names)  # of [units] each
            part = sum(float(scores[name][groups[group][name]].sum()) for name in names)
            # An expert that no token reached has importance 0, and so may a whole layer.
            held[key] = part / total if total else 0.0
        rows.append({**row, **held})
    return rows


def ablation_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """Utility loss and refusal margin with nothing ablated (first row), then of each ablation.

    Rows have ``group``, ``random``, ``units``, ``fraction`` and the fields of a ``Measurement``.
    """
    table = Table(
        title="Utility loss, and refusal margin (above 0: refuses), in nats per token",
        **_STYLE,
    )
    table.add_column("ablated", no_wrap=True)
    for name in ("units", "share", "loss", "", "margin", "", "refuses"):
        table.add_column(name, justify="right", no_wrap=True)
    first: Mapping[str, Any] | None = None  # with nothing ablated: the others are told against it
    for row in rows:  # which are measured as they come, a minute each
        measured = f"{row['utility_loss']:.2f}", f"{row['refusal_margin']:+.2f}"
        if first is None:
            first = row
            table.add_row(
                "nothing", "", "", measured[0], "", measured[1], "", f"{row['refuses']:.0%}"
            )
            continue
        if not row["random"]:  # a group and as many random units stand together
            table.add_section()
        name = "  as many, random" if row["random"] else NAMES[row["group"]]
        table.add_row(
            Text(name, style=COLOURS["random" if row["random"] else row["group"]]),
            f"{row['units']:,}",
            f"{row['fraction']:.1%}",
            measured[0],
            _change(row["utility_loss"] - first["utility_loss"]),
            measured[1],
            _change(row["refusal_margin"] - first["refusal_margin"]),
            f"{row['refuses']:.0%}",
        )
    return table


def _change(value: float) -> Text:
    # 0.5 nats a token: e^0.5 = 1.6 times the perplexity, which nobody overlooks in the answers
    return Text(f"{value:+.2f}", style="bold" if abs(value) >= 0.5 else "dim")


def _bar(share: float) -> Text:
    filled = round(share * _BAR)
    return Text.assemble(("■" * filled, ""), ("·" * (_BAR - filled), "dim"), f" {share:4.0%}")
