"""Ways to train a model: under a plan, or by low-rank adapters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ssah.training import UpdatePlan


@dataclass(frozen=True)
class Trained:
    """What is trained of a model.

    Attributes:
        module: for the trainer.
        plan: in force on the model, or None.
        finish: to be called afterwards; returns an ordinary model.
    """

    module: nn.Module
    plan: UpdatePlan | None
    finish: Callable[[], PreTrainedModel]


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        lr: learning rate.
        prepare: given the model and a seed, says what is trained of it.
    """

    lr: float
    prepare: Callable[[PreTrainedModel, int], Trained]


def planned(plan: UpdatePlan) -> Trained:
    """Training under a plan; that what is frozen did not move is verified at the end."""

    def finish() -> PreTrainedModel:
        plan.verify()  # before it is closed: afterwards nothing knows what was frozen
        plan.close()
        return plan.model

    return Trained(plan.model, plan, finish)


def lora(model: PreTrainedModel, rank: int) -> Trained:
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

    return Trained(adapted, None, finish)
