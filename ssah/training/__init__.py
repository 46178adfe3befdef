"""Training some units and freezing the others: the plan, its slices, its optimiser, saving."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ssah.lazy import submodules_of
from ssah.training.freezing import freeze, train_only
from ssah.training.plan import UpdatePlan, plan_of
from ssah.training.saving import load_update
from ssah.training.splitting import runs

if TYPE_CHECKING:
    from ssah.training.importance_callback import ImportanceCallback

__all__ = [
    "ImportanceCallback",
    "UpdatePlan",
    "freeze",
    "load_update",
    "plan_of",
    "train_only",
]

_submodule = submodules_of(__name__)


def __getattr__(name: str) -> Any:
    # Not imported until it is used: it needs transformers' Trainer, and with it many packages.
    if name == "ImportanceCallback":
        from ssah.training.importance_callback import ImportanceCallback

        return ImportanceCallback
    return _submodule(name)
