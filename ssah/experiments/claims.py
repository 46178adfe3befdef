"""What a study claims, with its interval: paired over requests (or rows) and seeds."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from ssah.evaluation.intervals import paired_difference

__all__ = ["claim"]

Expected = Literal["lower", "higher", "not higher"]
Unit = Literal["points", "nats", "cosine"]

_UNITS = {"points": (100.0, 1), "nats": (1.0, 3), "cosine": (1.0, 3)}  # factor, digits


def claim(
    text: str,
    first: Tensor,
    second: Tensor,
    expected: Expected,
    unit: Unit,
    *,
    slack: float = 0.0,
    among: str = "requests",
    note: str = "",
) -> dict[str, Any]:
    """Whether ``first`` is lower (or higher) than ``second``, by a 95 % interval of the difference.

    A claim holds where the whole interval is on its side, is contradicted where all of it is on the
    other, and is undecided otherwise.

    Args:
        text: the claim.
        first, second: ``[requests]`` or ``[requests, seeds]``, paired; bootstrapped by request.
        expected: of ``first``: ``"lower"``, ``"higher"``, or ``"not higher"`` than ``second`` by
            more than ``slack``.
        unit: ``"points"`` where values are rates in [0, 1], ``"nats"`` where they are losses,
            ``"cosine"`` where they are cosine distances.
        slack: for ``"not higher"``, in the unit of the values.
        among: what the first dimension is.
        note: a sentence to put at the end.

    Returns:
        Plain data: ``claim``, ``holds``, ``verdict`` (``"reproduces"``, ``"contradicted"`` or
        ``"undecided"``), ``value`` and ``interval`` of first - second, ``half_width``, ``unit``,
        ``sentence``.
    """
    value, (low, high) = paired_difference(first, second)
    holds, contradicted = {
        "lower": (high < 0, low > 0),
        "higher": (low > 0, high < 0),
        "not higher": (high <= slack, low > slack),
    }[expected]
    verdict = "reproduces" if holds else "contradicted" if contradicted else "undecided"
    factor, digits = _UNITS[unit]
    shown = [f"{factor * x:+.{digits}f}" for x in (value, low, high)]
    seeds = first.shape[1] if first.dim() == 2 else 1
    n = f"{len(first)} {among}" + (f" x {seeds} seeds" if seeds > 1 else "")
    sentence = (
        f"{text}: {shown[0]} {unit} (95 % interval {shown[1]} to {shown[2]}, {n}). "
        + _verdict(verdict, expected, f"{factor * slack:g} {unit}")
    )
    return {
        "claim": text,
        "holds": holds,
        "verdict": verdict,
        "value": value,
        "interval": [low, high],
        "half_width": (high - low) / 2,
        "unit": unit,
        "sentence": f"{sentence} {note}".strip(),
    }


def _verdict(verdict: str, expected: str, slack: str) -> str:
    if verdict == "reproduces":
        return "This reproduces."
    if expected == "not higher":
        above = "is above" if verdict == "contradicted" else "reaches beyond"
        return f"This does not reproduce: the interval {above} {slack}."
    if verdict == "contradicted":
        return "This does not reproduce: the difference has the other sign."
    return "This is not shown: the interval includes 0."
