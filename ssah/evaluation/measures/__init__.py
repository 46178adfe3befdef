"""Numbers of a model from its log-probabilities: loss, refusal margin, coherence of answers."""

from __future__ import annotations

from ssah.evaluation.measures.coherent_answers import Coherence, coherence
from ssah.evaluation.measures.continuations import continuation_log_probs
from ssah.evaluation.measures.input_gradients import input_gradient_norms
from ssah.evaluation.measures.logits import Predictions, logits_at, summed_log_prob
from ssah.evaluation.measures.loss import (
    log_probs_by_length,
    response_log_probs,
    utility_loss,
)
from ssah.evaluation.measures.loss_and_margin import Measurement, Measures, ablations
from ssah.evaluation.measures.margin import (
    COMPLIANCE,
    REFUSAL,
    opened,
    refusal_margin,
    refusal_margins,
)

__all__ = [
    "COMPLIANCE",
    "REFUSAL",
    "Coherence",
    "Measurement",
    "Measures",
    "Predictions",
    "ablations",
    "coherence",
    "continuation_log_probs",
    "input_gradient_norms",
    "log_probs_by_length",
    "logits_at",
    "opened",
    "refusal_margin",
    "refusal_margins",
    "response_log_probs",
    "summed_log_prob",
    "utility_loss",
]
