"""Edits that are a training: a copy of the aligned model learns something, before any task.

    method      what trains                          on what
    SafeNeuron  all but the safety neurons           preferences
    SN-Tune     the safety neurons alone             refusals

The control trains on the same rows in the same order, with as many random units of each module in
the place of the chosen ones.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssah.deltas import Out
from ssah.methods.drawing import Chosen, random_like
from ssah.methods.inputs import Inputs
from ssah.methods.outcomes import Edited
from ssah.training import UpdatePlan
from ssah.units import UnitSet

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def trained_edit(
    inputs: Inputs,
    units: UnitSet,
    plan: Callable[[PreTrainedModel, Chosen], UpdatePlan],
    train: Callable[[UpdatePlan], None],
) -> Edited:
    """The aligned model after a training, which is made when it is asked for.

    Args:
        inputs: with the aligned model in memory; it stays as it is.
        units: that the method has chosen.
        plan: `ssah.freeze` or `ssah.train_only`.
        train: trains a copy of the model, on which the plan is in force.
    """

    def trained(chosen: Chosen, out: Out) -> dict[str, Tensor]:
        if out is not None:
            raise ValueError(
                f"out is {os.fspath(out)!r}, must be None where a model in memory is trained: give "
                "the result to model.load_state_dict, and call model.save_pretrained"
            )
        model = copy.deepcopy(inputs.model)
        before = {name: value.dtype for name, value in model.state_dict().items()}
        if model.dtype != torch.float64:
            model.float()  # small updates of bfloat16 weights would round to nothing
        with plan(model, chosen) as own:
            train(own)
        state = model.state_dict()
        made = {name: state[name].detach().cpu().to(dtype) for name, dtype in before.items()}
        _check_moved(made, inputs.model)
        return made

    return Edited(
        lambda out: trained(units, out),
        lambda seed: lambda out: trained(random_like(units, seed), out),
        facts={"units": len(units)},
    )


def _check_moved(made: Mapping[str, Tensor], model: PreTrainedModel) -> None:
    """Refuse, with ValueError, a training of which the dtype of the model keeps nothing."""
    if all(made[name].equal(value.cpu()) for name, value in model.state_dict().items()):
        raise ValueError(
            f"training changed no weight by as much as {model.dtype} can show; raise lr or the "
            "number of updates, or load the model in float32"
        )
