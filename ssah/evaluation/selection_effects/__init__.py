"""What each of many selections does to a model: exactly, to first order, and together."""

from __future__ import annotations

from ssah.evaluation.selection_effects.arm_effects import Effects, effects
from ssah.evaluation.selection_effects.divergence import Divergence, divergences
from ssah.evaluation.selection_effects.first_order import (
    RankingAgreement,
    first_order_effects,
    ranking_agreement,
)
from ssah.evaluation.selection_effects.left_subspaces import left_subspace_angles
from ssah.evaluation.selection_effects.searching import GreedySearch, greedy_search

__all__ = [
    "Divergence",
    "Effects",
    "GreedySearch",
    "RankingAgreement",
    "divergences",
    "effects",
    "first_order_effects",
    "greedy_search",
    "left_subspace_angles",
    "ranking_agreement",
]
