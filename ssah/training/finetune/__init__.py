"""Fine-tuning under a plan with ``transformers.Trainer``: what ``ssah finetune`` runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ssah.lazy import names_of

if TYPE_CHECKING:
    from ssah.training.finetune.folder import check_folder
    from ssah.training.finetune.memory import preview
    from ssah.training.finetune.run import count_parameters, fine_tune, optimizer_options
    from ssah.training.finetune.selection import select_rows, select_units
    from ssah.training.finetune.settings import Settings
    from ssah.training.finetune.trainer import make_trainer

__all__ = [
    "Settings",
    "count_parameters",
    "fine_tune",
    "optimizer_options",
    "select_rows",
    "select_units",
]

# Not imported until they are used, as those of ssah.training.
__getattr__ = names_of(
    __name__,
    folder="check_folder",
    memory="preview",
    run="count_parameters fine_tune optimizer_options",
    selection="select_rows select_units",
    settings="Settings",
    trainer="make_trainer",
)
