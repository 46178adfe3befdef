"""What a model loses: utility (loss, perplexity) and safety (margin of refusal, attack success)."""

from __future__ import annotations

from ssah.evaluation.attacks import (
    Refusals,
    answer_rates,
    attack_success,
    category_rates,
    cosa_score,
    distinct_judges,
    identical_tokens,
    judge_answers,
    judged_answers,
    macro_difference,
    policy_rates,
    rate,
    refusals_change,
    summary,
)
from ssah.evaluation.generating import (
    OPENING,
    Answer,
    Request,
    answers,
    check_room,
    fitting,
    generate,
    prompts,
    room_of,
)
from ssah.evaluation.intervals import (
    Unit,
    bootstrap,
    check_level,
    difference,
    macro_interval,
    paired_difference,
    wilson,
)
from ssah.evaluation.judges import Judge, judge
from ssah.evaluation.letters import letter_log_probs, letter_scores, without_bias
from ssah.evaluation.measures import (
    COMPLIANCE,
    REFUSAL,
    Coherence,
    Measurement,
    Measures,
    ablations,
    coherence,
    input_gradient_norms,
    opened,
    refusal_margin,
    refusal_margins,
    response_log_probs,
    utility_loss,
)
from ssah.evaluation.perplexity import Perplexity, count_words
from ssah.evaluation.probing import Probe, probe
from ssah.evaluation.selection_effects import (
    Divergence,
    Effects,
    GreedySearch,
    RankingAgreement,
    divergences,
    effects,
    first_order_effects,
    greedily,
    greedy_search,
    kl_divergence,
    left_subspace,
    left_subspace_angles,
    next_token_log_probs,
    ranking_agreement,
)
from ssah.evaluation.tasks import check_tasks, multiple_choice
from ssah.lazy import submodules_of

__all__ = [
    "COMPLIANCE",
    "REFUSAL",
    "Answer",
    "Coherence",
    "Divergence",
    "Effects",
    "GreedySearch",
    "Judge",
    "Measurement",
    "Measures",
    "RankingAgreement",
    "Refusals",
    "ablations",
    "answers",
    "attack_success",
    "bootstrap",
    "category_rates",
    "coherence",
    "cosa_score",
    "divergences",
    "effects",
    "first_order_effects",
    "generate",
    "greedily",
    "greedy_search",
    "identical_tokens",
    "input_gradient_norms",
    "judge",
    "judge_answers",
    "left_subspace",
    "left_subspace_angles",
    "letter_log_probs",
    "letter_scores",
    "macro_difference",
    "macro_interval",
    "next_token_log_probs",
    "paired_difference",
    "policy_rates",
    "ranking_agreement",
    "rate",
    "refusal_margin",
    "refusal_margins",
    "refusals_change",
    "response_log_probs",
    "utility_loss",
    "wilson",
    "without_bias",
]

__getattr__ = submodules_of(__name__)
