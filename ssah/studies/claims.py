"""What a study claims, with its interval: paired over requests (or rows) and seeds.

For example, of 100 requests a model gives in to 60 with nothing frozen and to 45 with SCU frozen,
and on 35 of them the two differ. The difference is -15 points, and its interval, of about -26 to
-4, comes from drawing the 100 requests anew, each with both its answers. It lies below 0: the claim
that freezing lowers the ASR reproduces. Had it reached from -16 to +2, it would be undecided.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from ssah.evaluation import Unit, difference, wilson

Expected = Literal["lower", "higher", "not higher"]

# Unit -> by what a value is multiplied to be shown, and with how many digits. Points are percent.
_UNITS = {"points": (100.0, 1), "nats": (1.0, 3), "cosine": (1.0, 3)}


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
    measured = measured_difference(first, second, unit)
    value, (low, high) = measured["value"], measured["interval"]
    holds, contradicted = {
        "lower": (high < 0, low > 0),
        "higher": (low > 0, high < 0),
        "not higher": (high <= slack, low > slack),
    }[expected]
    verdict = "reproduces" if holds else "contradicted" if contradicted else "undecided"
    factor, digits = _UNITS[unit]
    shown = [f"{factor * x:+.{digits}f}" for x in (value, low, high)]
    seeds = first.shape[1] if first.dim() == 2 else 1  # [requests, seeds], or [requests]
    n = f"{measured.pop('n')} {among}" + (f" x {seeds} seeds" if seeds > 1 else "")
    sentence = (
        f"{text}: {shown[0]} {unit} (95 % interval {shown[1]} to {shown[2]}, {n}). "
        + _verdict(verdict, expected, f"{factor * slack:g} {unit}")
    )
    return {
        "claim": text,
        "holds": holds,
        "verdict": verdict,
        **measured,
        "sentence": f"{sentence} {note}".strip(),
    }


def measured_difference(first: Tensor, second: Tensor, unit: Unit) -> dict[str, Any]:
    """`ssah.evaluation.difference` as plain data.

    Args:
        first, second: ``[requests]`` or ``[requests, seeds]``, paired.
        unit: as of `claim`.

    Returns:
        ``value`` and 95 % ``interval`` of first - second, ``half_width``, ``unit``, and ``n``: how
        many requests.
    """
    value, (low, high) = difference(first, second, unit)
    half_width = (high - low) / 2
    found = {"value": value, "interval": [low, high], "half_width": half_width, "unit": unit}
    return {**found, "n": len(first)}


def least_shown(found: Mapping[str, Any]) -> float:
    """Half the width that the interval of a difference of rates counts for, a fraction.

    At least Wilson's upper bound of none of n: where few requests changed the interval is narrow,
    and a larger difference would have had a wider one.

    Args:
        found: of `measured_difference`, in points.
    """
    return max(found["half_width"], none_of(found))


def none_of(found: Mapping[str, Any]) -> float:
    """Wilson's upper bound of none of the n requests of a difference, a fraction."""
    return wilson(0, found["n"])[1]


def _verdict(verdict: str, expected: str, slack: str) -> str:
    if verdict == "reproduces":
        return "This reproduces."
    if expected == "not higher":
        # Its interval is held against the slack, so a sentence about 0 would be wrong.
        if verdict == "contradicted":
            return f"This does not reproduce: the interval is above {slack}."
        return f"This is not shown: the interval reaches beyond {slack}."
    if verdict == "contradicted":
        return "This does not reproduce: the difference has the other sign."
    return "This is not shown: the interval includes 0."
