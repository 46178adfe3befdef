"""What a method gives: what trains, a change for a while, or an edit; each with its control.

A control has the same size and nothing of the method's choice. Without one a result says little:
on one model freezing all safety-critical and complex units kept the refusals, and so did freezing
as many random ones.

    outcome   of the method                control of the same size
    Trained   the units to freeze          as many random units of each module
    Changed   one direction projected out  a random direction projected out
    Edited    a low-rank part added        the same singular values in random directions
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ssah.deltas import Out
from ssah.interventions import HiddenChange, WeightChange, intervene
from ssah.methods.drawing import Chosen, random_like
from ssah.training import UpdatePlan, freeze, train_only


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
