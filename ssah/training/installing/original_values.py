"""The values that trained slices had when the plan was made, put back for a forward pass.

Preference training compares a model with the one that it began as. Under a plan the two differ in
what trains alone, so that the values of the slices before training are all that a second model
would add. Example: of 0.3 B parameters 20 % train; the reference costs a fifth of a second model.

    with plan.disabled():
        reference = model(**batch).logits  # of the model that the plan was made for
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from ssah.models import weights_hash
from ssah.training.installing.installed import Installed


class OriginalValues:
    """What the slices of one plan were.

    Args:
        installed: what the plan has changed.
        weights_hash: of the model when the plan was made; None if it is sharded.

    Attributes:
        in_place: whether they are in the model now.
    """

    def __init__(self, installed: Installed, weights_hash: str | None) -> None:
        self._installed, self._weights_hash = installed, weights_hash
        # One for each slice. While they are in place: what has been trained.
        self._values: list[Tensor] | None = None
        self.in_place = False

    def keep(self) -> None:
        """Copy them, unless that was done.

        Raises:
            ValueError: the model is sharded.
            RuntimeError: something has changed the weights since the plan was made.
        """
        if self._installed.sharded:
            raise ValueError(
                "model is sharded, must be in one memory for its original values to be put back: "
                "load a second model as the reference"
            )
        if self._values is not None:
            return
        # A copy that is taken too late would be of another model than it is taken for.
        if weights_hash(self._installed.model) != self._weights_hash:
            raise RuntimeError(
                "the weights are no longer those that the plan was made with (trained, loaded or "
                "cast since), so that nobody has these any more: call plan.keep_originals() right "
                "after freeze() or train_only(), before training and before a checkpoint is loaded"
            )
        self._values = [each.parameter.detach().clone() for each in self._installed.slices()]

    def __deepcopy__(self, memo: dict[int, Any]) -> OriginalValues:
        new = type(self)(copy.deepcopy(self._installed, memo), self._weights_hash)
        # A copy that is made while they are in place has them as its own trained values.
        if self._values is not None and not self.in_place:
            new._values = [value.clone() for value in self._values]
        return new

    def check_trained(self) -> None:
        """Refuse, with RuntimeError, what must not be done while they are in place."""
        if self.in_place:
            raise RuntimeError(
                "the original values are in the model now, not what was trained: leave the block "
                "of plan.disabled() first"
            )

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """They are in the model inside the block, without gradients; within another: nothing more.

        Raises:
            ValueError, RuntimeError: as `keep`; the model was given further parameters or cast; an
                optimiser steps, or a backward pass runs, inside the block.
        """
        if self.in_place:
            yield
            return
        self.keep()
        parameters = self._checked_parameters()
        hooks: list[Any] = [p.register_hook(_no_backward) for p in parameters]
        held = {id(p) for p in parameters}

        def no_step(optimizer: Optimizer, *_: Any) -> None:
            if any(id(p) in held for group in optimizer.param_groups for p in group["params"]):
                self.check_trained()

        hooks.append(register_optimizer_step_pre_hook(no_step))
        try:
            with torch.no_grad():
                self._swap(parameters)
                self.in_place = True
                try:
                    yield
                finally:
                    self._swap(parameters)
                    self.in_place = False
        finally:
            for hook in hooks:
                hook.remove()

    def _checked_parameters(self) -> list[nn.Parameter]:
        """The slices, of a model in which they are all that trains."""
        assert self._values is not None
        parameters = [each.parameter for each in self._installed.slices()]
        known = {id(p) for p in parameters}
        added = [name for name, p in self._installed.parameters() if id(p) not in known]
        if added:
            raise RuntimeError(
                f"the model was given parameters since the plan was made ({added[0]!r}), which "
                "plan.disabled() cannot take away: remove them, or disable adapters by their own "
                "means"
            )
        for parameter, value in zip(parameters, self._values, strict=True):
            if parameter.dtype != value.dtype:
                raise RuntimeError(
                    f"a slice was {value.dtype} and is {parameter.dtype}, must be what it was: the "
                    "original values would be rounded"
                )
        return parameters

    def _swap(self, parameters: list[nn.Parameter]) -> None:
        """Exchange the values of the slices with those that are kept."""
        assert self._values is not None
        for i, parameter in enumerate(parameters):
            # In place, since slices alias their weights; through .data, since what a graph outside
            # of the block has saved is there again, bit for bit, before its backward pass.
            now = parameter.data.clone()
            parameter.data.copy_(self._values[i])
            self._values[i] = now
        for projection in self._installed.masked.values():
            projection.sync()


class Reversible:
    """The part of a plan that takes its model back to what it was."""

    _originals: OriginalValues

    def _check_open(self) -> None:
        raise NotImplementedError

    def keep_originals(self) -> None:
        """Copy what the slices are, for `disabled`: before training, or resuming, begins.

        Raises:
            ValueError, RuntimeError: the model is sharded; its weights changed since the plan.
        """
        self._check_open()
        self._originals.keep()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside the block the model has its weights from before the plan, and no gradients.

        Its logits are, bit for bit, those of the model when the plan was made. Afterwards every
        slice has what was trained again, bit for bit, also if the block raises. The first block
        calls `keep_originals`, unless that was done. Blocks may be nested.

        Raises:
            ValueError: the model is sharded.
            RuntimeError: the weights changed before they were kept; the model was cast or given
                adapters since; inside the block an optimiser steps, a backward pass runs, or the
                plan is saved or closed.
        """
        self._check_open()
        with self._originals.put_back():
            yield


def _no_backward(grad: Tensor) -> None:
    raise RuntimeError(
        "a backward pass runs inside plan.disabled(), where it would take the original weights "
        "for the trained ones: call it after the block"
    )
