"""``ssah compare``: published methods side by side on one model, each beside its control."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ssah.lazy import names_of

if TYPE_CHECKING:
    from ssah.studies.compare.run import dry_run, run_compare
    from ssah.studies.compare.settings import CompareSets, CompareSettings
    from ssah.studies.compare.verdicts import recommend, verdict

__all__ = ["CompareSets", "CompareSettings", "dry_run", "recommend", "run_compare", "verdict"]

__getattr__ = names_of(
    __name__,
    run="dry_run run_compare",
    settings="CompareSets CompareSettings",
    verdicts="recommend verdict",
)
