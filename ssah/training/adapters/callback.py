"""Protected adapters in a trainer that makes the adapter itself, as TRL's do (``peft_config=``)."""

from __future__ import annotations

from typing import Any

from ssah.compat.trainer import TrainerCallback
from ssah.selections import Selection
from ssah.training.adapters.protection import ProtectedAdapter, protect_adapter
from ssah.units import UnitSet


class AdapterCallback(TrainerCallback):
    """Protects the adapter of a trainer before its first step, and checks it at each save.

    Example: ``SFTTrainer(model, args, peft_config=LoraConfig(...), train_dataset=rows,
    callbacks=[ssah.training.AdapterCallback(groups["scu"])])``.

    Args:
        units, only: as of :func:`ssah.protect_adapter`, which says what is refused.
    """

    def __init__(self, units: UnitSet | Selection, *, only: bool = False) -> None:
        self.units, self.only = units, only
        self.protected: ProtectedAdapter | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Protect the adapter, whether it is fresh or was resumed from a protected one."""
        self.protected = protect_adapter(kwargs["model"], self.units, only=self.only)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What was saved changes no protected unit."""
        if self.protected is not None:
            self.protected.verify()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The adapter is checked once more; what may train afterwards is the caller's affair."""
        if self.protected is not None:
            self.protected.verify()
            self.protected.remove()
