"""What a model loses: utility (loss, perplexity) and safety (margin of refusal, attack success)."""

from __future__ import annotations

from ssah.evaluation.attack import attack_success, judge_answers, rate
from ssah.evaluation.coherence import Coherence, coherence
from ssah.evaluation.generation import Answer, answers, generate
from ssah.evaluation.intervals import bootstrap, paired_difference, wilson
from ssah.evaluation.judges import Judge, judge
from ssah.evaluation.loss import response_log_probs, utility_loss
from ssah.evaluation.margin import COMPLIANCE, REFUSAL, refusal_margin, refusal_margins
from ssah.evaluation.measure import Measurement, Measures, ablations
from ssah.lazy import submodules_of

__all__ = [
    "COMPLIANCE",
    "REFUSAL",
    "Answer",
    "Coherence",
    "Judge",
    "Measurement",
    "Measures",
    "ablations",
    "answers",
    "attack_success",
    "bootstrap",
    "coherence",
    "generate",
    "judge",
    "judge_answers",
    "paired_difference",
    "rate",
    "refusal_margin",
    "refusal_margins",
    "response_log_probs",
    "utility_loss",
    "wilson",
]

__getattr__ = submodules_of(__name__)
