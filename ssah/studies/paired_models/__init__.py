"""Models measured beside the intact one, on the same requests and rows, and whether they lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ssah.lazy import names_of

if TYPE_CHECKING:
    from ssah.studies.paired_models.measuring import (
        INTACT,
        PairedModels,
        PairedRows,
        differences,
        model_summary,
    )
    from ssah.studies.paired_models.settings import PairedSets, PairedSettings
    from ssah.studies.paired_models.verdicts import damage

__all__ = [
    "INTACT",
    "PairedModels",
    "PairedRows",
    "PairedSets",
    "PairedSettings",
    "damage",
    "differences",
    "model_summary",
]

__getattr__ = names_of(
    __name__,
    measuring="INTACT PairedModels PairedRows differences model_summary",
    settings="PairedSets PairedSettings",
    verdicts="damage",
)
