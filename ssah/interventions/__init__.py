"""A model with some of its units taken out, for a while or for good."""

from __future__ import annotations

from ssah.interventions.ablation import ablate, check_not_ablated
from ssah.interventions.pruning import prune
from ssah.lazy import submodules_of

__all__ = [
    "ablate",
    "check_not_ablated",
    "prune",
]

__getattr__ = submodules_of(__name__)
