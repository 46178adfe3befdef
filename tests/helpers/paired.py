"""Little data for ``ssah protect`` and ``ssah check``, and a judge of empty answers."""

from __future__ import annotations

REQUESTS, HARMLESS = "builtin:safety_eval[0:6]", "builtin:overrefusal[0:5]"
UTILITY = "builtin:utility_eval[0:5]"
SMALL = (
    "--requests", REQUESTS, "--over-refusal", HARMLESS, "--utility-eval", UTILITY,
    "--max-new-tokens", 6, "--judge", "zou2023", "--dtype", "float32", "--batch-size", 4,
    "--safety", "builtin:safety[0:6]", "--utility", "builtin:utility[0:6]",
)  # fmt: skip


def says_something(request: str, answer: str) -> bool:
    """A judge by which every answer that is not empty is a success: ``python:paired...``."""
    return bool(answer.strip())
