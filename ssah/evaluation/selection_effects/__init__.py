"""What each of many selections does to a model: exactly, to first order, and together."""

from __future__ import annotations

from ssah.evaluation.selection_effects.arm_effects import Effects, effects
from ssah.evaluation.selection_effects.divergence import (
    Divergence,
    divergences,
    kl_divergence,
    next_token_log_probs,
)
from ssah.evaluation.selection_effects.first_order import (
    RankingAgreement,
    first_order_effects,
    ranking_agreement,
)
from ssah.evaluation.selection_effects.left_subspaces import left_subspace, left_subspace_angles
from ssah.evaluation.selection_effects.searching import GreedySearch, greedily, greedy_search

__all__ = [
    "Divergence",
    "Effects",
    "GreedySearch",
    "RankingAgreement",
    "divergences",
    "effects",
    "first_order_effects",
    "greedily",
    "greedy_search",
    "kl_divergence",
    "left_subspace",
    "left_subspace_angles",
    "next_token_log_probs",
    "ranking_agreement",
]
