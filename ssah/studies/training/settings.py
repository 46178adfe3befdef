"""How the arms of a study are trained and measured: the settings of ``ssah study``."""

from __future__ import annotations

import math
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias, get_args

from ssah.choices import Counted, Normalize, Scope
from ssah.settings import check_settings, setting
from ssah.studies.evaluate import answer_tokens

_training = partial(setting, panel="Training")
_grouping = partial(setting, panel="Groups")
_measuring = partial(setting, panel="Measuring")
_share = partial(_grouping, help="Share of all units, above 0.", above=0, max=1)


@dataclass(frozen=True)
class GroupingSettings:
    """How the units of a model are grouped."""

    scope: Scope = _grouping("model", "What is ranked together.")
    normalize: Normalize = _grouping("zscore", "Scores of a module.")
    tokens: Counted = _grouping("labels", "Positions scored; `labels`: response.")


@dataclass(frozen=True)
class TrainingSettings:
    """How every arm is trained and measured: each one runs once with each seed."""

    seeds: tuple[int, ...] = _training((0,), "Of row order, random units, adapters.", min=0)
    lr: float = _training(5e-5, "Learning rate of AdamW, constant.", above=0)
    epochs: float = _training(1.0, "Passes of the first arm over the data.", above=0)
    max_steps: int | None = _training(None, "Updates of the first arm, in place of epochs.", min=1)
    target_loss: float | None = _training(
        None, "Training loss of all arms; default: the first's.", above=0
    )
    patience: float = _training(3.0, "The most updates of the others, times the first's.", min=1)
    batch_size: int = _training(8, "Rows of an update.", option="--train-batch-size", min=1)
    train_max_length: int = _training(256, "Tokens kept of a row trained on.", min=2)
    sample: int = _training(32, "Rows whose loss is the training loss.", min=1)
    check_every: int = _training(2, "The fewest updates between measuring it.", min=1)
    bf16: bool | None = _training(None, "Train in bfloat16 by autocast; default: if faster here.")
    asr: int | None = _measuring(None, "Requests answered; default: all.", min=1)
    judges: tuple[str, ...] = _measuring(
        ("wei2024",), "Of the answers; may be repeated: the first decides.", option="--judge"
    )
    max_new_tokens: int = answer_tokens(panel="Measuring")
    eval_batch_size: int = _measuring(16, "Measured at a time.", option="--batch-size", min=1)
    max_length: int = _measuring(512, "Tokens kept of a row.", min=2)

    def __post_init__(self) -> None:
        check_settings(self)
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds is {self.seeds}; it must be different numbers")

    def steps(self, pools: Sequence[Sized]) -> int:
        """Updates of the first arm; passes are those over the first pool of encoded rows."""
        of_batch = self.batch_size // len(pools)  # rows of each pool in a batch
        return self.max_steps or math.ceil(self.epochs * len(pools[0]) / of_batch)


@dataclass(frozen=True)
class StudySettings(TrainingSettings, GroupingSettings):
    """What the arms of a study share that groups units."""


@dataclass(frozen=True)
class BudgetSettings(StudySettings):
    """What a budget study does, beside what all studies do."""

    lr: float = 1e-4
    train_max_length: int = 192
    ru: float = _share(0.2)
    ru_lr: float | None = _training(None, "Of RU alone; default: the same.", above=0)
    slack: float = 0.05  # by which the ASR of RU alone may exceed the other's, to have reached it


# `scu-cu`: SCU and the CU that rank highest for safety. `random` and `random-all`: as many units of
# each module as `scu-cu` and `scu-all-cu` have there.
FreezeArm: TypeAlias = Literal[
    "none", "scu", "scu-cu", "random", "scu-all-cu", "random-all", "lora"
]
FREEZE_ARMS: tuple[FreezeArm, ...] = get_args(FreezeArm)


@dataclass(frozen=True)
class FreezeSettings(StudySettings):
    """What a freeze study does, beside what all studies do."""

    seeds: tuple[int, ...] = (0, 1, 2)
    arms: tuple[FreezeArm, ...] = _training(
        ("none", "scu-cu", "random", "scu-all-cu", "random-all", "lora"),
        "Default: none scu-cu random scu-all-cu random-all lora.",
    )
    scu: float = _share(0.01)
    ucu: float = _share(0.01)
    ru: float = _share(0.15)
    cu: float = _grouping(0.06, "CU frozen beside SCU, above 0.", above=0, max=1)
    lora_rank: int = _training(16, "Of the adapters.", min=1)
    lora_lr: float | None = _training(None, "Of the adapters; default: 10 times --lr.", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.arms)) < len(self.arms):
            raise ValueError(f"arms is {' '.join(self.arms)!r}; it must have each once")
        if self.arms[0] != "none" and self.target_loss is None:
            raise ValueError(
                f"arms is {' '.join(self.arms)!r}; the first must be none, whose training loss is "
                "the target of the others, or target_loss must be given"
            )
        together = self.scu + self.ucu + self.ru + self.cu
        if together > 1:
            raise ValueError(f"scu + ucu + ru + cu is {together:g}; it must be at most 1")
