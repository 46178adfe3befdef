"""The importance of trained units in the log of a ``transformers.Trainer``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ssah.compat.trainer import TrainerCallback
from ssah.units import UnitSet

if TYPE_CHECKING:
    from ssah.training.plan import UpdatePlan


class ImportanceCallback(TrainerCallback):
    """Adds to every log of a ``transformers.Trainer`` how important trained units have become.

    ``importance/<group>`` is the mean over the group's units of |sum of p * g| since the start.
    The optimiser must track it: ``plan.optimizer_cls_and_kwargs(args, track_importance=True)``.

    Args:
        plan: the plan that trains.
        groups: name -> units; all trained units by default.
    """

    def __init__(self, plan: UpdatePlan, groups: Mapping[str, UnitSet] | None = None) -> None:
        self.plan = plan
        self.groups = dict(groups) if groups is not None else {"trained": plan.trained_units}

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Extend the log that is being written."""
        if state.global_step == 0:
            return  # no optimiser has stepped: nothing is known yet
        # Of every unit the sum over all steps so far, of which the sign is dropped.
        signed = self.plan.importance().signed
        values = {}
        for group, units in self.groups.items():
            of_group = [signed[name][index].abs() for name, index in units.items()]
            joined = torch.cat(of_group) if of_group else torch.empty(0)
            values[f"importance/{group}"] = float(joined.mean()) if len(joined) else 0.0
        # Trackers read the one, `trainer.state.log_history` has a copy that was made before.
        kwargs.get("logs", {}).update(values)
        if state.log_history:
            state.log_history[-1].update(values)
