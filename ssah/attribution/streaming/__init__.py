"""Scores of a model that is larger than memory, layer by layer from its files."""

from __future__ import annotations

from ssah.attribution.streaming.run import STREAMED_METRICS, Traffic, stream

__all__ = ["STREAMED_METRICS", "Traffic", "stream"]
