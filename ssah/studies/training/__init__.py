"""Studies that train one model in several ways to equal training loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ssah.lazy import names_of

if TYPE_CHECKING:
    from ssah.studies.training.budget import run_budget
    from ssah.studies.training.freeze import run_freeze
    from ssah.studies.training.settings import BudgetSettings, FreezeSettings

__all__ = ["BudgetSettings", "FreezeSettings", "run_budget", "run_freeze"]

__getattr__ = names_of(
    __name__,
    budget="run_budget",
    freeze="run_freeze",
    settings="BudgetSettings FreezeSettings",
)
