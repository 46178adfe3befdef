"""Models before and after a training that nobody did, and what an edit makes of them."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import build
from torch import Tensor
from transformers import PreTrainedModel

from ssah.methods import Edited


def moved(model_name: str, seed: int, by: float) -> PreTrainedModel:
    """The same model a little further: what training might have made of it."""
    model = build(model_name, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += by * noise
    return model


def state(found: Any) -> dict[str, Tensor]:
    """What an edit of models in memory gives."""
    assert isinstance(found, Edited)
    made = found.write()
    assert isinstance(made, dict)
    return made
