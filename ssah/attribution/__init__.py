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
from ssah.attribution.streaming.run import stream
from ssah.attribution.watching import Sums, watching

__all__ = [
    "CONTENT",
    "IGNORED",
    "METRICS",
    "TOKENS",
    "Attribution",
    "Batch",
    "Sums",
    "attribute",
    "column_sq_norms",
    "discard",
    "may_drop_mask",
    "n_embeddings",
    "read_batch",
    "stream",
    "watching",
    "with_positions",
]
