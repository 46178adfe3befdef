"""How a fine-tune is protected: the settings and the data of ``ssah protect``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from ssah.settings import setting
from ssah.studies.paired_models.settings import PairedSets, PairedSettings

_method = partial(setting, panel="Method")
_training = partial(setting, panel="Training")
_needed = partial(setting, panel="What methods need")


@dataclass(frozen=True)
class ProtectSettings(PairedSettings):
    """How a model is fine-tuned, protected and measured."""

    # What measured best of what needs no choice of units, and no method has beaten its control yet:
    # docs/training/index.md.
    method: str = _method(
        "interpolation", "One that keeps refusals by training or editing: `ssah methods`."
    )
    set: tuple[str, ...] = _method(
        (), "Of the method, `alpha=0.25`; may be repeated.", metavar="NAME=VALUE"
    )
    compare_plain: bool = _method(False, "Measure also what the same fine-tune does unprotected.")
    lr: float = _training(2e-5, "Learning rate of AdamW, constant.", above=0)
    epochs: float = _training(1.0, "Passes over the data.", above=0)
    max_steps: int | None = _training(None, "Updates, in place of epochs.", min=1)
    train_batch_size: int = _training(8, "Rows of an update.", min=1)
    train_max_length: int = _training(512, "Tokens kept of a row trained on.", min=2)
    bf16: bool | None = _training(None, "Train in bfloat16 by autocast; default: if faster here.")
    seed: int = _training(0, "Of row order, and of what a method draws.", min=0)

    def steps(self, rows: int) -> int:
        """Updates of the fine-tune on so many rows."""
        return self.max_steps or math.ceil(self.epochs * rows / self.train_batch_size)


@dataclass(frozen=True)
class ProtectSets(PairedSets):
    """The rows that models are measured on, and those that methods need."""

    task_eval: str | None = setting(
        None,
        "Rows for the loss of the task; default: every tenth of `--data`, at most 64, which are "
        "not trained on.",
        panel="Data",
    )
    safety: str = _needed("builtin:safety", "Harmful requests with refusals.")
    utility: str = _needed("builtin:utility", "Ordinary instructions with answers.")
    unaligned: str | None = _needed(None, "The model before alignment.", metavar="MODEL")
    borderline: str | None = _needed(None, "Harmless requests that look dangerous.")
    harmful: str | None = _needed(None, "Your own harmful requests with harmful answers.")
    preferences: str | None = _needed(
        None, "Rows with `prompt`, `chosen` and `rejected`.", metavar="FILE"
    )
