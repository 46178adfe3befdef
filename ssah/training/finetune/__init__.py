"""Fine-tuning under a plan with ``transformers.Trainer``: what ``ssah finetune`` runs."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ssah.lazy import submodules_of
from ssah.training.finetune.folder import check_folder as check_folder
from ssah.training.finetune.selection import select_units
from ssah.training.finetune.settings import Settings

if TYPE_CHECKING:
    from ssah.training.finetune.memory import preview as preview
    from ssah.training.finetune.run import count_parameters, fine_tune, optimizer_options
    from ssah.training.finetune.trainer import make_trainer as make_trainer

__all__ = ["Settings", "count_parameters", "fine_tune", "optimizer_options", "select_units"]

# Imported as they are used: they need the Trainer, which loads many packages for seconds. Commands
# read the settings' fields and select units without it.
_LATER = {
    "count_parameters": "run",
    "fine_tune": "run",
    "make_trainer": "trainer",
    "optimizer_options": "run",
    "preview": "memory",
}

_submodule = submodules_of(__name__)


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
    return _submodule(name)
