"""How a fine-tuning run trains: the settings of ``ssah finetune`` and ``ssah align``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

from ssah.settings import check_settings, setting

# What does not change the weights that a run ends with: may be another when it is resumed.
_FREE = ("gradient_checkpointing", "save_steps", "logging_steps", "report_to")

_training = partial(setting, panel="Training")
_run = partial(setting, panel="Run")


@dataclass(frozen=True)
class Settings:
    """How to train; the names are the command line's.

    Raises:
        ValueError: a value is out of range, or a tracker is not installed.
    """

    lr: float = _training(2e-5, "Peak learning rate of AdamW.", above=0)
    epochs: float = _training(1.0, "Passes over the data.", above=0)
    max_steps: int | None = _training(None, "Updates, in place of epochs.", min=1)
    batch_size: int = _training(8, "Rows.", min=1)
    gradient_accumulation: int = _training(1, "Batches of an update.", min=1)
    weight_decay: float = _training(0.0, "Decoupled; norms and biases do not decay.", min=0)
    warmup_ratio: float = _training(0.0, "Share of the updates in which lr rises.", min=0, below=1)
    lr_scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = _training(
        "linear", "Of lr."
    )
    max_grad_norm: float = _training(1.0, "Clip to it; 0: never.", min=0)
    state_dtype: Literal["float32", "bfloat16", "8bit"] = _training(
        "float32", "Of AdamW's moments: 8, 4 or 2 bytes a trained weight."
    )
    bf16: bool = _training(False, "Compute in bfloat16; weights stay.")
    seed: int = _training(0, "Of order and rounding.", min=0)
    gradient_checkpointing: bool = _training(False, "Less memory, more time.")
    save_steps: int = _run(500, "Updates between checkpoints; 0: none.", min=0)
    logging_steps: int = _run(10, "Updates per log.", min=1)
    report_to: tuple[str, ...] = _run((), "`tensorboard`, `wandb`, ...; may be repeated.")

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.report_to:
            return
        from ssah.compat.trainer import get_available_reporting_integrations  # slow to import

        available = get_available_reporting_integrations()
        missing = [name for name in self.report_to if name not in available]
        if missing:
            raise ValueError(
                f"report_to is {missing[0]!r}; it must be a tracker that is installed "
                f"({', '.join(available) or 'none is'})"
            )

    def decisive(self) -> dict[str, Any]:
        """What changes the weights that a run ends with: name -> value."""
        decisive = {name: value for name, value in asdict(self).items() if name not in _FREE}
        # Runs of earlier releases do not name it, and had the moments of the default.
        if self.state_dtype == "float32":
            del decisive["state_dtype"]
        return decisive
