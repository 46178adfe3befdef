"""Sizes of the models whose kernels, scores and training steps are timed; needs Python alone."""

from __future__ import annotations

from dataclasses import dataclass

VOCABULARY = 32_000


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, as its configuration has them; ``layers`` of the whole model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocabulary: int = VOCABULARY


SMALL = Shape(1024, 2816, 20, heads=16, key_value_heads=8, head_dim=64)
LLAMA_1B = Shape(2048, 8192, 16, heads=32, key_value_heads=8, head_dim=64, vocabulary=128_256)
LLAMA_8B = Shape(4096, 14_336, 32, heads=32, key_value_heads=8, head_dim=128, vocabulary=128_256)
QWEN_14B = Shape(5120, 17_408, 40, heads=40, key_value_heads=8, head_dim=128, vocabulary=151_936)
GEMMA_12B = Shape(3840, 15_360, 48, heads=16, key_value_heads=8, head_dim=256, vocabulary=262_208)
