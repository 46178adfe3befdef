"""The optimisers of a plan, and what is looked at before one steps while plans are in force."""

from __future__ import annotations

from ssah.training.optimising.active import ACTIVE, PLAN, check_unplanned, retire, watch_optimizers
from ssah.training.optimising.optimised import Optimised
from ssah.training.optimising.optimizer import PlanAdamW

__all__ = [
    "ACTIVE",
    "PLAN",
    "Optimised",
    "PlanAdamW",
    "check_unplanned",
    "retire",
    "watch_optimizers",
]
