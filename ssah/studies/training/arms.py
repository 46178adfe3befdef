"""Ways to train a model: under a plan, or by low-rank adapters."""

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


def lora(model: PreTrainedModel, rank: int) -> TrainingSetup:
    """Low-rank adapters of all linear layers but the head, scaled by 2; merged at the end.

    Source: Hu et al., arXiv 2106.09685, as peft has it.

    Raises:
        ImportError: peft is not installed.
    """
    from peft import LoraConfig, get_peft_model  # imported when needed: it takes seconds

    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, config)

    def finish() -> PreTrainedModel:
        # Merged, so that every arm is measured as an ordinary model is.
        merged: PreTrainedModel = adapted.merge_and_unload()  # type: ignore[assignment]
        return merged

    return TrainingSetup(adapted, None, finish)
