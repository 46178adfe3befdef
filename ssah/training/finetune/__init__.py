"""Fine-tuning under a plan with ``transformers.Trainer``: what ``ssah finetune`` runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ssah.lazy import names_of

if TYPE_CHECKING:
    from ssah.training.finetune.run import (
        count_parameters,
        fine_tune,
        optimizer_options,
        select_units,
    )
    from ssah.training.finetune.settings import Settings

__all__ = ["Settings", "count_parameters", "fine_tune", "optimizer_options", "select_units"]

# Not imported until they are used, as those of ssah.training.
__getattr__ = names_of(
    __name__,
    run="count_parameters fine_tune optimizer_options select_units",
    settings="Settings",
)
