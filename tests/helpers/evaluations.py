"""``ssah evaluate`` as a user calls it, on little data."""

from __future__ import annotations

import json

from commands import call, fails

SMALL = (
    "--max-new-tokens", 8, "--judge", "zou2023", "--dtype", "float32", "--batch-size", 4,
    "--over-refusal", "builtin:overrefusal[0:5]", "--benign", "builtin:utility_eval[0:6]",
    "--utility", "builtin:utility_eval[0:6]", "--requests", "builtin:safety_eval[0:7]",
)  # fmt: skip


def evaluate(*arguments: object) -> dict:
    return json.loads(call("evaluate", *arguments, "--json").stdout)


def refused(*arguments: object, code: int = 2) -> str:
    """The error of an evaluation that cannot be made."""
    return fails("evaluate", *arguments, code=code)
