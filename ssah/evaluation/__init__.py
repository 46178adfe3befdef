"""What a model loses: utility (loss, perplexity) and safety (margin of refusal, attack success)."""

from __future__ import annotations

from ssah.evaluation.arm_effects import Effects, effects
from ssah.evaluation.attack import (
    attack_success,
    distinct_judges,
    judge_answers,
    judged_answers,
)
from ssah.evaluation.coherence import Coherence, coherence
from ssah.evaluation.divergence import (
    Divergence,
    divergences,
    kl_divergence,
    next_token_log_probs,
)
from ssah.evaluation.first_order import (
    RankingAgreement,
    first_order_effects,
    ranking_agreement,
)
from ssah.evaluation.generation import Answer, answers, generate
from ssah.evaluation.input_gradients import input_gradient_norms
from ssah.evaluation.intervals import (
    Unit,
    bootstrap,
    check_level,
    difference,
    paired_difference,
    wilson,
)
from ssah.evaluation.judges import Judge, judge
from ssah.evaluation.left_subspaces import left_subspace_angles
from ssah.evaluation.loss import response_log_probs, utility_loss
from ssah.evaluation.loss_and_margin import Measurement, Measures, ablations
from ssah.evaluation.margin import COMPLIANCE, REFUSAL, opened, refusal_margin, refusal_margins
from ssah.evaluation.perplexity import Perplexity, count_words
from ssah.evaluation.probing import Probe, probe
from ssah.evaluation.prompting import OPENING, check_room, fitting, prompts, room_of
from ssah.evaluation.rates import answer_rates, rate, summary
from ssah.evaluation.refusals import Refusals, refusals_change
from ssah.evaluation.searching import GreedySearch, greedy_search
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
    "coherence",
    "divergences",
    "effects",
    "first_order_effects",
    "generate",
    "greedy_search",
    "input_gradient_norms",
    "judge",
    "judge_answers",
    "left_subspace_angles",
    "next_token_log_probs",
    "paired_difference",
    "ranking_agreement",
    "rate",
    "refusal_margin",
    "refusal_margins",
    "refusals_change",
    "response_log_probs",
    "utility_loss",
    "wilson",
]

__getattr__ = submodules_of(__name__)
