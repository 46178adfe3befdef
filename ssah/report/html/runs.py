"""Tables of what ``ssah demo`` and ``ssah finetune`` leave. What a result lacks is left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssah.report.colours import NAMES
from ssah.report.html.plain import Table, number
from ssah.report.html.records import (
    MEASURED,
    MEASURED_NOTE,
    UNITS,
    generic,
    list_of,
    mapping_of,
    records_table,
    with_rows,
)

_TRAINING = (
    ("steps", "steps", ""),
    ("epochs", "epochs", ".2f"),
    ("loss, first", "loss_first", ".3f"),
    ("loss, last", "loss_last", ".3f"),
    ("held-out loss before", "eval_loss_before", ".3f"),
    ("after", "eval_loss", ".3f"),
)
_SPEED = (
    ("tokens/s", "tokens_per_second", ",.0f"),
    ("time of attribute", "attribute_time_ratio", ".2f"),
)


def finetune(result: Mapping[str, Any]) -> list[Table]:
    """How a training run ended."""
    if not any(key in result for _, key, _ in _TRAINING):
        return generic(result)
    return [records_table("Training", [result], [], _TRAINING, "Losses in nats per token.")]


def demo(result: Mapping[str, Any]) -> list[Table]:
    """Alignment, ablations, groups per layer, speed."""
    alignment = mapping_of(result, "alignment")  # empty where the model was aligned before
    steps, seconds = number(alignment.get("steps")), number(alignment.get("seconds"), ".0f")
    sides = [{"when": when, **mapping_of(alignment, when)} for when in ("before", "after")]
    ablations = [
        {
            **row,
            "what": f"as many random as {str(row.get('group')).upper()}"
            if row.get("random")
            else NAMES.get(str(row.get("group")), "nothing"),  # the first row has no group
        }
        for row in list_of(result, "ablation")
    ]
    calls = mapping_of(mapping_of(result, "throughput"), "calls")
    speed = [{"call": call, **row} for call, row in calls.items() if isinstance(row, Mapping)]
    found = [
        records_table(
            f"Alignment: {steps} steps in {seconds} s",
            sides if alignment else [],
            [("", "when")],
            MEASURED,
            MEASURED_NOTE,
        ),
        records_table(
            "Ablation",
            ablations,
            [("ablated", "what")],
            [UNITS, ("share", "fraction", ".1%"), *MEASURED],
        ),
        records_table(
            "Units per layer",
            list_of(mapping_of(result, "groups"), "layers"),
            [("layer", "layer")],
            [UNITS, *((group.upper(), group, "") for group in ("scu", "ucu", "ru", "cu"))],
        ),
        records_table("Speed", speed, [("call", "call")], _SPEED),
    ]
    known = ("alignment", "ablation", "groups", "throughput", "pictures", "seconds", "scores")
    return [*with_rows(*found), *generic(result, *known)]
