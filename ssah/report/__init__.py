"""Results for people: tables in the terminal, pictures, and one HTML page."""

from __future__ import annotations

from ssah.lazy import submodules_of
from ssah.report.colours import COLOURS, IMPLEMENTATIONS, NAMES, SCORING

__all__ = ["COLOURS", "IMPLEMENTATIONS", "NAMES", "SCORING"]

__getattr__ = submodules_of(__name__)
