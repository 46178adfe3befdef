"""Scores of units: in memory, over several processes, or streamed from a checkpoint."""

from __future__ import annotations

from ssah.attribution.batches import (
    IGNORED,
    Batch,
    BatchReader,
    counted_tokens,
    may_drop_mask,
)
from ssah.attribution.imatrix import save_imatrix
from ssah.attribution.mean_differences import effect_sizes, mean_shifts
from ssah.attribution.partial_runs import discard, refuse_other
from ssah.attribution.result import CONTENT, METRICS, TOKENS, Attribution
from ssah.attribution.scores import column_sq_norms
from ssah.attribution.scoring import attribute
from ssah.attribution.streaming.layers import LayeredModel
from ssah.attribution.streaming.run import stream
from ssah.attribution.sums import new_sums
from ssah.attribution.watch import watching
from ssah.attribution.weights import (
    WeightAttribution,
    attribute_weights,
    consistent,
    set_difference,
)
from ssah.attribution.weights.matrices import find_matrices
from ssah.lazy import submodules_of

__all__ = [
    "METRICS",
    "TOKENS",
    "Attribution",
    "WeightAttribution",
    "attribute",
    "attribute_weights",
    "consistent",
    "effect_sizes",
    "mean_shifts",
    "save_imatrix",
    "set_difference",
    "stream",
]

__getattr__ = submodules_of(__name__)
