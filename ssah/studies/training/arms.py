"""One way to train a model, of several that a study compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ssah.methods import TrainingSetup

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        lr: learning rate.
        prepare: given the model and a seed, makes it ready for a trainer.
    """

    lr: float
    prepare: Callable[[PreTrainedModel, int], TrainingSetup]
