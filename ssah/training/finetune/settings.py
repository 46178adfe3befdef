"""How a fine-tuning run trains: the settings of ``ssah finetune`` and ``ssah align``."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["SCHEDULERS", "Settings", "decisive"]

SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup")

# What does not change the weights that a run ends with: may be another when it is resumed.
_FREE = ("gradient_checkpointing", "save_steps", "logging_steps", "report_to")
_LEAST = {
    "batch_size": 1,
    "gradient_accumulation": 1,
    "logging_steps": 1,
    "save_steps": 0,
    "seed": 0,
}


@dataclass(frozen=True)
class Settings:
    """How to train; the names are the command line's.

    Attributes:
        lr: peak learning rate of AdamW.
        epochs: passes over the data; may be a fraction.
        max_steps: stop after so many updates instead, or None.
        batch_size: rows of a batch.
        gradient_accumulation: batches of an update.
        weight_decay: decoupled; norms and biases do not decay.
        warmup_ratio: share of the updates during which the learning rate rises, in [0, 1).
        lr_scheduler: one of ``SCHEDULERS``.
        max_grad_norm: clip the norm of the trained entries' gradients to this; 0: do not clip.
        bf16: compute in bfloat16 by autocast; weights keep their dtype.
        seed: of the order of rows, dropout and rounding.
        gradient_checkpointing: keep the input of each layer alone, and compute the rest again.
        save_steps: updates from one checkpoint to the next; 0: none, the run cannot be resumed.
        logging_steps: updates from one log of the loss to the next.
        report_to: trackers that transformers knows, such as ``"tensorboard"``.

    Raises:
        ValueError: a value is out of range, or a tracker is not installed.
    """

    lr: float = 2e-5
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 8
    gradient_accumulation: int = 1
    weight_decay: float = 0.0
    warmup_ratio: float = 0.0
    lr_scheduler: str = "linear"
    max_grad_norm: float = 1.0
    bf16: bool = False
    seed: int = 0
    gradient_checkpointing: bool = False
    save_steps: int = 500
    logging_steps: int = 10
    report_to: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("lr", "epochs", "weight_decay", "max_grad_norm"):
            value, above_zero = getattr(self, name), name in ("lr", "epochs")
            if not math.isfinite(value) or value < 0 or (above_zero and value == 0):
                bound = "greater than 0" if above_zero else "at least 0"
                raise ValueError(f"{name} is {value}; it must be {bound}")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio is {self.warmup_ratio}; it must be in [0, 1)")
        if self.lr_scheduler not in SCHEDULERS:
            raise ValueError(
                f"lr_scheduler is {self.lr_scheduler!r}; it must be one of {', '.join(SCHEDULERS)}"
            )
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps is {self.max_steps}; it must be at least 1 or None")
        if self.report_to:
            _check_trackers(self.report_to)


def _check_trackers(names: tuple[str, ...]) -> None:
    # Not at the top: whoever reads the settings' fields alone need not load the Trainer.
    from ssah.compat.trainer import get_available_reporting_integrations

    available = get_available_reporting_integrations()
    missing = [name for name in names if name not in available]
    if missing:
        raise ValueError(
            f"report_to is {missing[0]!r}; it must be a tracker that is installed "
            f"({', '.join(available) or 'none is'})"
        )


def decisive(settings: Settings) -> dict[str, Any]:
    """The settings that decide with which weights a run ends: name -> value."""
    return {name: value for name, value in asdict(settings).items() if name not in _FREE}
