"""Training some units and freezing the others: the plan, its slices, its optimiser, saving."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ssah.lazy import submodules_of
from ssah.training.adapters import ProtectedAdapter, protect_adapter
from ssah.training.freezing import freeze, train_only
from ssah.training.plan import UpdatePlan
from ssah.training.saving import load_update, plan_of
from ssah.training.split_tensor import runs
from ssah.training.verifying import verify

if TYPE_CHECKING:
    from ssah.training.adapter_callback import AdapterCallback
    from ssah.training.importance import ImportanceCallback

__all__ = [
    "AdapterCallback",
    "ImportanceCallback",
    "ProtectedAdapter",
    "UpdatePlan",
    "freeze",
    "load_update",
    "plan_of",
    "protect_adapter",
    "train_only",
    "verify",
]

_submodule = submodules_of(__name__)


def __getattr__(name: str) -> Any:
    # Not imported until they are used: they need transformers' Trainer, and with it many packages.
    if name == "ImportanceCallback":
        from ssah.training.importance import ImportanceCallback

        return ImportanceCallback
    if name == "AdapterCallback":
        from ssah.training.adapter_callback import AdapterCallback

        return AdapterCallback
    return _submodule(name)
