"""What a plan trained, as files: saved, read, merged, and added to a model for a while."""

from __future__ import annotations

from ssah.training.updates.attaching import Attached, attach
from ssah.training.updates.merging import load_update, placed_update, read_update
from ssah.training.updates.saving import push_update, save_update
from ssah.training.updates.updated_models import is_update, load_trained, load_trained_tokenizer

__all__ = [
    "Attached",
    "attach",
    "is_update",
    "load_trained",
    "load_trained_tokenizer",
    "load_update",
    "placed_update",
    "push_update",
    "read_update",
    "save_update",
]
