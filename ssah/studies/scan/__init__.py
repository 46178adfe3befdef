"""``ssah scan``: which units, how many of them, and by which way of grouping."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ssah.lazy import names_of

if TYPE_CHECKING:
    from ssah.studies.scan.run import run_scan
    from ssah.studies.scan.settings import ScanSettings

__all__ = ["ScanSettings", "run_scan"]

__getattr__ = names_of(
    __name__,
    run="run_scan",
    settings="ScanSettings",
)
