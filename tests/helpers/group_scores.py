"""Scores to make groups of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssah.attribution import Attribution

Scores = dict[str, list[float]]


def tensors(scores: Scores) -> dict[str, Tensor]:
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in scores.items()}


def attribution(scores: dict[str, Tensor] | None = None, **changed: Any) -> Attribution:
    scores = {"a": torch.arange(4.0, dtype=torch.float64)} if scores is None else scores
    fields: dict[str, Any] = {
        "metric": "variance",
        "tokens": "labels",
        "model_name": "tiny",
        "units_hash": "c0ffee",
        "data_fingerprint": "data",
    }
    counts = dict.fromkeys(scores, 2)
    mean, variance = ({name: x + i for name, x in scores.items()} for i in (1, 2))
    return Attribution(scores, mean, variance, counts, **(fields | changed))
