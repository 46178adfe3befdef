"""Caches of keys and values: how they are called, and where a prompt may be run in parts.

A prompt of 6 tokens may be run as 4 tokens whose keys and values are kept, and 2 that go on from
them: position 5 attends to the same keys either way. That does not hold of a layer that keeps a
window or a running state, nor where hidden states are changed at some positions of whole prompts.
"""

from __future__ import annotations

from typing import Any

from transformers import DynamicLayer

SHARED = 8  # tokens of a beginning that are worth a pass of their own


def cache_of(output: Any) -> dict[str, Any]:
    """The cache by the name that this release has for it; empty for a model that keeps none.

    Such a model is given its whole rows again, which takes longer and gives the same.
    """
    # The older name is last: where both are there, they are the same cache.
    for name in ("cache", "past_key_values"):
        if (cache := getattr(output, name, None)) is not None:
            return {name: cache}
    return {}


def is_plain(past: dict[str, Any]) -> bool:
    """Whether there is a cache that holds keys and values of every position, and nothing else."""
    layers = [layer for cache in past.values() for layer in getattr(cache, "layers", [None])]
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)
