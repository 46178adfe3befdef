"""What a method gives: what trains or how, a change for a while, or an edit; each with a control.

A control has the same size and nothing of the method's choice. Without one a result says little:
on one model freezing all safety-critical and complex units kept the refusals, and so did freezing
as many random ones.

    outcome   of the method                control of the same size
    Trained   the units to freeze          as many random units of each module
    Procedure refusals in every batch      ordinary answers in every batch
    Changed   one direction projected out  a random direction projected out
    Edited    a low-rank part added        the same singular values in random directions
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor, nn
from transformers import PreTrainedModel

from ssah.data import Encoded
from ssah.deltas import Out
from ssah.interventions import HiddenChange, WeightChange, intervene
from ssah.methods.drawing import Chosen, random_like
from ssah.training import UpdatePlan, freeze, train_only

if TYPE_CHECKING:
    from ssah.compat.trainer import TrainerCallback

# Encoded rows of the task, rows of a batch, updates, seed -> rows in the order of training, batch
# after batch. Fewer updates give the first of them.
RowOrder: TypeAlias = Callable[[Sequence[Encoded], int, int, int], list[Encoded]]


@dataclass(frozen=True, eq=False)
class Outcome(ABC):
    """What a method has found.

    Attributes:
        facts: what it chose, as plain data for a record: numbers of layers or heads, counts.
    """

    facts: Mapping[str, Any] = field(default_factory=dict, kw_only=True)

    @abstractmethod
    def control(self, seed: int) -> Outcome:
        """The same with a choice that is not the method's: of the same size, drawn by ``seed``."""


@dataclass(frozen=True, eq=False)
class TrainingSetup:
    """A model made ready for a trainer.

    Attributes:
        module: for the trainer: the model, or a peft model over it.
        plan: in force on the model, or None.
        finish: to be called afterwards; returns an ordinary model. It raises what
            `UpdatePlan.verify` does where a frozen weight moved.
        order: gives the rows in the order of training; None: those of the task alone, shuffled.
        callbacks: for the trainer.
        lr_scale: what the learning rate of a fine-tune is multiplied by: adapters, which start from
            zero, need a larger one.
    """

    module: nn.Module
    plan: UpdatePlan | None
    finish: Callable[[], PreTrainedModel]
    order: RowOrder | None = None
    callbacks: tuple[TrainerCallback, ...] = ()
    lr_scale: float = 1.0


def planned(plan: UpdatePlan) -> TrainingSetup:
    """Training under a plan; that what is frozen did not move is verified at the end."""

    def finish() -> PreTrainedModel:
        plan.verify()  # before it is closed: afterwards nothing knows what was frozen
        plan.close()
        return plan.model

    return TrainingSetup(plan.model, plan, finish)


@dataclass(frozen=True, eq=False)
class Trained(Outcome):
    """A part of the model that does not train, or that trains alone.

    Attributes:
        selection: the part.
        alone: whether it trains and nothing else does; by default it is frozen.
        draw: gives a part of the same size; by default as many of each kind, at random.
    """

    selection: Chosen
    alone: bool = False
    draw: Callable[[int], Chosen] | None = None

    def control(self, seed: int) -> Trained:
        """As of `Outcome`."""
        # Layers in a row, for one, are drawn by their method: at random they would be scattered.
        drawn = random_like(self.selection, seed) if self.draw is None else self.draw(seed)
        return Trained(drawn, self.alone, self.draw, facts={"seed": seed})

    def plan(self, model: PreTrainedModel) -> UpdatePlan:
        """Prepare ``model`` for training, as `ssah.freeze` or `ssah.train_only` do.

        Errors as of these.
        """
        return train_only(model, self.selection) if self.alone else freeze(model, self.selection)

    def prepare(self, model: PreTrainedModel, seed: int) -> TrainingSetup:
        """As of `Procedure`; nothing here is drawn by ``seed``."""
        return planned(self.plan(model))


@dataclass(frozen=True, eq=False)
class Procedure(Outcome):
    """Fine-tuning in another way: other rows in its batches, a term in its loss, adapters.

    Attributes:
        setup: makes a model ready, as `prepare` does.
        draw: gives what makes a model ready for the control of a seed.
    """

    setup: Callable[[PreTrainedModel, int], TrainingSetup]
    draw: Callable[[int], Callable[[PreTrainedModel, int], TrainingSetup]]

    def control(self, seed: int) -> Procedure:
        """As of `Outcome`."""
        return Procedure(self.draw(seed), self.draw, facts={"seed": seed})

    def prepare(self, model: PreTrainedModel, seed: int) -> TrainingSetup:
        """Make ``model`` ready for a trainer.

        Args:
            model: the aligned model; it trains in place.
            seed: of what the training draws: adapters, the order of rows.

        Raises:
            ImportError: peft is needed, and not installed.
            ValueError: the model cannot be trained in this way.
        """
        return self.setup(model, seed)


@dataclass(frozen=True, eq=False)
class Changed(Outcome):
    """A model that runs with something changed.

    Attributes:
        changes: of weights and hidden states, as `ssah.intervene` takes them.
        draw: gives changes of the same size.
    """

    changes: tuple[WeightChange | HiddenChange, ...]
    draw: Callable[[int], tuple[WeightChange | HiddenChange, ...]]

    def control(self, seed: int) -> Changed:
        """As of `Outcome`."""
        return Changed(self.draw(seed), self.draw, facts={"seed": seed})

    def on(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """Context manager: ``model`` runs changed inside; errors as of `ssah.intervene`."""
        return intervene(model, *self.changes)


@dataclass(frozen=True, eq=False)
class Edited(Outcome):
    """A model with other weights, which is computed when it is asked for.

    Attributes:
        make: computes it, as `write` does.
        draw: gives what computes the control of a seed.
    """

    make: Callable[[Out], Path | dict[str, Tensor]]
    draw: Callable[[int], Callable[[Out], Path | dict[str, Tensor]]]

    def control(self, seed: int) -> Edited:
        """As of `Outcome`."""
        return Edited(self.draw(seed), self.draw, facts={"seed": seed})

    def write(self, out: Out = None) -> Path | dict[str, Tensor]:
        """Compute the weights; the models that they are made of stay as they are.

        Args:
            out: for folders, where the model goes: new or empty. None for models in memory.

        Returns:
            ``out``; or a state dict on the CPU, name -> ``[...]``, for ``model.load_state_dict``.
            Errors as of `ssah.deltas.interpolate`.
        """
        return self.make(out)
