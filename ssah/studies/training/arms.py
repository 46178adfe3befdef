"""One way to train a model, of several that a study compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ssah.methods import TrainingSetup

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        lr: learning rate.
        prepare: given the model and a seed, makes it ready for a trainer.
        told: what ``prepare`` says of it, as plain data for the record.
    """

    lr: float
    prepare: Callable[[PreTrainedModel, int], TrainingSetup]
    told: dict[str, Any] = field(default_factory=dict)
