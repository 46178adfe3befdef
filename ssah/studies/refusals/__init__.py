"""``ssah refusals``: a model's own refusals, as a safety set to score its units on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ssah.lazy import names_of

if TYPE_CHECKING:
    from ssah.studies.refusals.run import run_refusals
    from ssah.studies.refusals.settings import RefusalSettings

__all__ = ["RefusalSettings", "run_refusals"]

__getattr__ = names_of(
    __name__,
    run="run_refusals",
    settings="RefusalSettings",
)
