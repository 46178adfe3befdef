"""Training a part of a model and freezing the rest: the plan, its slices, its optimiser, saving.

Nothing is imported until it is used: ``ssah finetune --help`` reads ``finetune/settings.py`` alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ssah.lazy import names_of

if TYPE_CHECKING:
    from ssah.training.adapters.callback import AdapterCallback
    from ssah.training.adapters.card import LoraExport, adapter_card
    from ssah.training.adapters.entries import frozen_entries, may_change
    from ssah.training.adapters.exporting import export_lora
    from ssah.training.adapters.protection import ProtectedAdapter, protect_adapter
    from ssah.training.adapters.writing import LoraFactors, write_adapter
    from ssah.training.ascent import bounded_ascent
    from ssah.training.entries import Entries
    from ssah.training.fitting import fit, log_probs_under
    from ssah.training.freezing import freeze, train_only
    from ssah.training.importance_callback import ImportanceCallback
    from ssah.training.plan import UpdatePlan, plan_of
    from ssah.training.plan_callback import PlanCallback
    from ssah.training.preference_training import train_on_preferences
    from ssah.training.preferences import preference_loss
    from ssah.training.preparing import prepare_trainer
    from ssah.training.proximal_callback import ProximalCallback
    from ssah.training.row_training import train_on_rows
    from ssah.training.splitting import runs
    from ssah.training.updates import (
        Attached,
        attach,
        is_update,
        load_trained,
        load_trained_tokenizer,
        load_update,
    )
    from ssah.training.verifying import verify
    from ssah.training.weight_changes import ChangedWeight, WeightChanges, apply_changes

__all__ = [
    "AdapterCallback",
    "Attached",
    "ChangedWeight",
    "ImportanceCallback",
    "LoraExport",
    "PlanCallback",
    "ProtectedAdapter",
    "ProximalCallback",
    "UpdatePlan",
    "WeightChanges",
    "apply_changes",
    "attach",
    "bounded_ascent",
    "export_lora",
    "freeze",
    "load_trained",
    "load_update",
    "plan_of",
    "preference_loss",
    "prepare_trainer",
    "protect_adapter",
    "train_on_preferences",
    "train_only",
    "verify",
]

__getattr__ = names_of(
    __name__,
    **{"adapters.callback": "AdapterCallback"},
    **{"adapters.card": "LoraExport adapter_card", "adapters.entries": "frozen_entries may_change"},
    **{"adapters.exporting": "export_lora"},
    **{"adapters.protection": "ProtectedAdapter protect_adapter"},
    **{"adapters.writing": "LoraFactors write_adapter"},
    ascent="bounded_ascent",
    entries="Entries",
    fitting="fit log_probs_under",
    freezing="freeze train_only",
    importance_callback="ImportanceCallback",
    plan="UpdatePlan plan_of",
    plan_callback="PlanCallback",
    preferences="preference_loss",
    preference_training="train_on_preferences",
    preparing="prepare_trainer",
    proximal_callback="ProximalCallback",
    row_training="train_on_rows",
    splitting="runs",
    updates="Attached attach is_update load_trained load_trained_tokenizer load_update",
    verifying="verify",
    weight_changes="ChangedWeight WeightChanges apply_changes",
)
