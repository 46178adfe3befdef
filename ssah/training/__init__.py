"""Training some units and freezing the others: the plan, its slices, its optimiser, saving.

Nothing is imported until it is used: ``ssah finetune --help`` reads ``finetune/settings.py`` alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ssah.lazy import names_of

if TYPE_CHECKING:
    from ssah.training.adapters.callback import AdapterCallback
    from ssah.training.adapters.protection import ProtectedAdapter, protect_adapter
    from ssah.training.freezing import freeze, train_only
    from ssah.training.importance_callback import ImportanceCallback
    from ssah.training.plan import UpdatePlan, plan_of
    from ssah.training.plan_callback import PlanCallback
    from ssah.training.preparing import prepare_trainer
    from ssah.training.saving import load_update
    from ssah.training.splitting import runs
    from ssah.training.verifying import verify

__all__ = [
    "AdapterCallback",
    "ImportanceCallback",
    "PlanCallback",
    "ProtectedAdapter",
    "UpdatePlan",
    "freeze",
    "load_update",
    "plan_of",
    "prepare_trainer",
    "protect_adapter",
    "train_only",
    "verify",
]

__getattr__ = names_of(
    __name__,
    **{"adapters.callback": "AdapterCallback"},
    **{"adapters.protection": "ProtectedAdapter protect_adapter"},
    freezing="freeze train_only",
    importance_callback="ImportanceCallback",
    plan="UpdatePlan plan_of",
    plan_callback="PlanCallback",
    preparing="prepare_trainer",
    saving="load_update",
    splitting="runs",
    verifying="verify",
)
