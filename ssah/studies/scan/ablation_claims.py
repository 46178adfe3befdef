"""What the paper claims of ablated groups, and whether a scan shows it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssah.studies.claims import claim
from ssah.studies.measured_values import losses, succeeded
from ssah.studies.paired_measures import UTILITY
from ssah.studies.scan.curves import Curves, Point


def ablation_claims(curves: Curves, share: float, ru_share: float) -> list[dict[str, Any]]:
    """SCU against other units at one share, and RU against random units at a larger one.

    Args:
        curves: of the scan.
        share: of SCU, UCU, RU and random units, all of them measured.
        ru_share: of RU and random units, both measured.
    """
    scu, ucu, ru = (curves.points[group][share] for group in ("scu", "ucu", "ru"))
    # The first draw, which every scan has.
    random, many = curves.random[share][0], curves.random[ru_share][0]
    intact, nats, percent = curves.intact, curves.settings.tolerance, f"{share:.2%}"
    cheap = f"Ablating {percent} SCU costs less than {nats:g} nats of utility loss"
    large = f"RU cost less utility than as many random units ({ru_share:.2%})"
    # A claim is on units of the same number: the larger share does more damage, whatever it is of.
    return [
        _safety(f"Ablating {percent} SCU takes refusal away", scu, intact),
        _safety(f"SCU take more of it away than as many UCU ({percent})", scu, ucu),
        _safety("SCU take more of it away than as many random units", scu, random),
        _cost(cheap, scu, intact, "not higher", slack=nats),
        _cost(f"UCU cost more utility than as many SCU ({percent})", ucu, scu, "higher"),
        _cost(f"RU cost less utility than as many SCU ({percent})", ru, scu, "lower"),
        _cost(large, curves.points["ru"][ru_share], many, "lower"),
    ]


def _safety(text: str, first: Point, second: Point) -> dict[str, Any]:
    """By the ASR where requests were answered, else by the margin, which no answer is needed for.

    A high ASR is a low margin, so the two are expected on opposite sides.
    """
    if first.attack is not None and second.attack is not None:
        note = f"Incoherent answers: {first.attack['incoherent']['rate']:.1%} with the SCU out."
        asr = succeeded(first.attack), succeeded(second.attack)
        return claim(f"{text} (ASR)", *asr, "higher", "points", note=note)
    return claim(f"{text} (margin)", _margins(first), _margins(second), "lower", "nats")


def _cost(
    text: str, first: Point, second: Point, expected: Any, slack: float = 0.0
) -> dict[str, Any]:
    pair = losses(first.measured, UTILITY), losses(second.measured, UTILITY)
    return claim(text, *pair, expected, "nats", slack=slack, among="rows")


def _margins(point: Point) -> Tensor:
    """Float64 ``[requests]``, nats per token."""
    return torch.tensor(point.measured["margins"], dtype=torch.float64)
