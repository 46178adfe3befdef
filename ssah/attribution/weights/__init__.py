"""Importance of single weights: scores of every entry of a matrix, and choices made of them."""

from __future__ import annotations

from ssah.attribution.weights.combining import consistent, set_difference
from ssah.attribution.weights.result import WeightAttribution
from ssah.attribution.weights.scoring import attribute_weights
from ssah.lazy import submodules_of

__all__ = [
    "WeightAttribution",
    "attribute_weights",
    "consistent",
    "set_difference",
]

__getattr__ = submodules_of(__name__)
