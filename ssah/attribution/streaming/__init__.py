"""Scores of a model that is larger than memory, layer by layer from its files."""

from __future__ import annotations

from ssah.attribution.streaming.run import STREAMED_METRICS, Traffic, stream
from ssah.lazy import submodules_of

__all__ = ["STREAMED_METRICS", "Traffic", "stream"]

__getattr__ = submodules_of(__name__)
