"""Scores of units: in memory, over several processes, or streamed from a checkpoint."""

from __future__ import annotations

from ssah.attribution.batches import IGNORED, Batch, n_embeddings, read_batch
from ssah.attribution.partial_runs import discard
from ssah.attribution.positions import with_positions
from ssah.attribution.scoring import (
    CONTENT,
    METRICS,
    TOKENS,
    Attribution,
    attribute,
    column_sq_norms,
    may_drop_mask,
)
from ssah.attribution.streaming.layers import LayeredModel
from ssah.attribution.streaming.run import stream
from ssah.attribution.watch import Sums, watching
from ssah.lazy import submodules_of

__all__ = [
    "METRICS",
    "TOKENS",
    "Attribution",
    "attribute",
    "stream",
]

__getattr__ = submodules_of(__name__)
