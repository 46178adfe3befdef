"""Hidden states of a set of texts, reduced as they come: means, directions, how two sets differ."""

from __future__ import annotations

from ssah.lazy import submodules_of
from ssah.representations.activations import unit_activations
from ssah.representations.comparing import (
    PairCosines,
    Separation,
    mean_difference,
    pair_cosines,
    separation,
)
from ssah.representations.linear_probes import logistic_regression
from ssah.representations.moments import Representations, represent
from ssah.representations.openings import opening_shifts
from ssah.representations.positions import Position, Positions, StatePositions, check_positions
from ssah.representations.recording import batches_at, hidden_states, layers_of, recorded
from ssah.representations.vocabulary import (
    token_contrast,
    top_tokens,
    vocabulary_projection,
)

__all__ = [
    "PairCosines",
    "Representations",
    "Separation",
    "hidden_states",
    "logistic_regression",
    "mean_difference",
    "opening_shifts",
    "pair_cosines",
    "represent",
    "separation",
    "token_contrast",
    "top_tokens",
    "unit_activations",
    "vocabulary_projection",
]

__getattr__ = submodules_of(__name__)
