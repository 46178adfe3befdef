"""Tables of what ``ssah demo`` and ``ssah finetune`` leave. What a result lacks is left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssah.report import NAMES
from ssah.report.html.plain import Table, number
from ssah.report.html.records import (
    MEASURED,
    MEASURED_NOTE,
    UNITS,
    generic,
    list_of,
    mapping_of,
    records_table,
)

__all__ = ["demo", "finetune"]


def finetune(result: Mapping[str, Any]) -> list[Table]:
    """How a training run ended."""
    values = (
        ("steps", "steps", ""),
        ("epochs", "epochs", ".2f"),
        ("loss, first", "loss_first", ".3f"),
        ("loss, last", "loss_last", ".3f"),
        ("held-out loss before", "eval_loss_before", ".3f"),
        ("after", "eval_loss", ".3f"),
    )
    if not any(key in result for _, key, _ in values):
        return generic(result)
    return [records_table("Training", [result], [], values, "Losses in nats per token.")]


def demo(result: Mapping[str, Any]) -> list[Table]:
    """Alignment, ablations, groups per layer, speed."""
    found = []
    alignment = mapping_of(result, "alignment")
    if alignment:
        rows = [{"when": when, **mapping_of(alignment, when)} for when in ("before", "after")]
        steps, seconds = number(alignment.get("steps")), number(alignment.get("seconds"), ".0f")
        title = f"Alignment: {steps} steps in {seconds} s"
        found.append(records_table(title, rows, [("", "when")], MEASURED, MEASURED_NOTE))
    ablations = [
        {
            **row,
            "what": f"as many random as {str(row.get('group')).upper()}"
            if row.get("random")
            else NAMES.get(str(row.get("group")), "nothing"),
        }
        for row in list_of(result, "ablation")
    ]
    if ablations:
        columns = [UNITS, ("share", "fraction", ".1%"), *MEASURED]
        found.append(records_table("Ablation", ablations, [("ablated", "what")], columns))
    groups = mapping_of(result, "groups")
    layers = list_of(groups, "layers")
    if layers:
        columns = [UNITS, *((group.upper(), group, "") for group in ("scu", "ucu", "ru", "cu"))]
        found.append(records_table("Units per layer", layers, [("layer", "layer")], columns))
    rates = mapping_of(mapping_of(result, "throughput"), "calls")
    if rates:
        speed = [{"call": call, **row} for call, row in rates.items() if isinstance(row, Mapping)]
        columns = [
            ("tokens/s", "tokens_per_second", ",.0f"),
            ("time of attribute", "attribute_time_ratio", ".2f"),
        ]
        found.append(records_table("Speed", speed, [("call", "call")], columns))
    known = ("alignment", "ablation", "groups", "throughput", "pictures", "seconds", "scores")
    return [*found, *generic(result, *known)]
