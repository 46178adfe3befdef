"""How often a model answers what it should refuse: its answers, judged, as rates and changes."""

from __future__ import annotations

from ssah.evaluation.attacks.attack import (
    attack_success,
    distinct_judges,
    judge_answers,
    judged_answers,
)
from ssah.evaluation.attacks.batching import identical_tokens
from ssah.evaluation.attacks.policies import cosa_score, policy_rates
from ssah.evaluation.attacks.rates import (
    answer_rates,
    category_rates,
    macro_difference,
    rate,
    refused_requests,
    summary,
)
from ssah.evaluation.attacks.refusals import Refusals, refusals_change

__all__ = [
    "Refusals",
    "answer_rates",
    "attack_success",
    "category_rates",
    "cosa_score",
    "distinct_judges",
    "identical_tokens",
    "judge_answers",
    "judged_answers",
    "macro_difference",
    "policy_rates",
    "rate",
    "refusals_change",
    "refused_requests",
    "summary",
]
