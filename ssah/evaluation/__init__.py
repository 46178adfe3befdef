"""What a model loses: utility (loss on ordinary answers) and safety (margin of refusal)."""

from __future__ import annotations

from ssah.evaluation.loss import response_log_probs, utility_loss
from ssah.evaluation.margin import COMPLIANCE, REFUSAL, refusal_margin, refusal_margins
from ssah.evaluation.measure import Measurement, Measures, ablations

__all__ = [
    "COMPLIANCE",
    "REFUSAL",
    "Measurement",
    "Measures",
    "ablations",
    "refusal_margin",
    "refusal_margins",
    "response_log_probs",
    "utility_loss",
]
