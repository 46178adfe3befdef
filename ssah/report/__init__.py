"""Results for people: tables in the terminal and pictures, in the same colours."""

from __future__ import annotations

__all__ = ["COLOURS", "NAMES"]

# Told apart by people with any kind of colour vision (after Okabe and Ito).
COLOURS = {
    "scu": "#d55e00",
    "ucu": "#0072b2",
    "cu": "#009e73",
    "ru": "#8c8c8c",
    "random": "#b07aa1",
}
NAMES = {
    "scu": "safety-critical (SCU)",
    "ucu": "utility-critical (UCU)",
    "cu": "complex (CU)",
    "ru": "redundant (RU)",
    "random": "random",
}
