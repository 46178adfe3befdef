"""What must not be forgotten at the end of a training run, for ``transformers.Trainer`` and TRL."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ssah.compat.trainer import TrainerCallback

if TYPE_CHECKING:
    from ssah.training.plan import UpdatePlan


class PlanCallback(TrainerCallback):
    """Verifies a plan at each checkpoint and at the end, saves the update, and closes the plan.

    Args:
        plan: the plan of the trainer's model.
        update_dir: folder that the update is saved to at the end; None: nowhere.
    """

    def __init__(self, plan: UpdatePlan, update_dir: str | os.PathLike[str] | None = None) -> None:
        self.plan, self.update_dir = plan, update_dir

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse, with RuntimeError, a plan that is closed, and one of another model."""
        trains = {id(p) for p in self.plan.parameters()}
        missing = trains - {id(p) for p in kwargs["model"].parameters()}
        if missing:
            raise RuntimeError(
                f"PlanCallback has the plan of another model: the trainer's lacks {len(missing)} "
                "of its parameters. Give both the same model"
            )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise RuntimeError, at the checkpoint that was just written, if a frozen weight moved."""
        self.plan.verify()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Verify, then save, then close. The model is an ordinary one afterwards."""
        self.plan.verify()
        # Of a sharded model every rank has a part to put in; the first one writes.
        if self.update_dir is not None and (self.plan.ranks or state.is_world_process_zero):
            self.plan.save_pretrained(self.update_dir)
        self.plan.close()
