"""Fine-tuning under a plan with ``transformers.Trainer``: what ``ssah finetune`` runs."""

from __future__ import annotations

from ssah.lazy import submodules_of
from ssah.training.finetune.run import (
    Settings,
    count_parameters,
    fine_tune,
    optimizer_options,
    select_units,
)

__all__ = ["Settings", "count_parameters", "fine_tune", "optimizer_options", "select_units"]

__getattr__ = submodules_of(__name__)
