"""One way to train a model, of several that a study compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ssah.methods import TrainingSetup

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ssah.training import UpdatePlan


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


def freezes(plan: UpdatePlan | None) -> bool:
    """Whether there is a plan that freezes anything: one that freezes nothing trains all."""
    if plan is None:
        return False
    trained = sum(parameter.numel() for parameter in plan.parameters())
    # Of a parameter with single frozen weights all entries are there, under a mask.
    return bool(plan.masked) or trained < plan.n_parameters
