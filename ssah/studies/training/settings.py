"""What all studies that train have in common: how arms are trained and measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ssah.data import Encoded
from ssah.studies.inputs import check_grouping

__all__ = ["StudySettings"]


@dataclass(frozen=True)
class StudySettings:
    """What the arms of a study share.

    Attributes:
        seeds: of the order of rows, random units and adapters: each arm runs once with each.
        scope, normalize, tokens: how units are grouped, see ``ssah.classify`` and ``attribute``.
        lr: learning rate of the first arm, and of the others unless they have their own.
        epochs: passes of the first arm over the data.
        max_steps: updates of the first arm, in place of epochs, or None.
        target_loss: training loss, nats per token, until which every arm trains; None: that of the
            first arm with the same seed, when it has taken its steps.
        patience: the most updates of an arm that trains to a loss, times those of the first arm.
        batch_size: rows of an update.
        train_max_length: tokens kept of a row that is trained on.
        sample: rows of the training data whose loss is the training loss.
        check_every: the fewest updates from one measurement of it to the next.
        asr: how many requests are answered and judged; None: all.
        judges: of the answers; the first one decides.
        max_new_tokens: the most tokens of an answer.
        eval_batch_size: sequences measured at a time.
        max_length: tokens kept of other rows.
        bf16: whether training computes in bfloat16; None: where that is faster.
    """

    seeds: tuple[int, ...] = (0,)
    scope: str = "model"
    normalize: str = "zscore"
    tokens: str = "labels"
    lr: float = 5e-5
    epochs: float = 1.0
    max_steps: int | None = None
    target_loss: float | None = None
    patience: float = 3.0
    batch_size: int = 8
    train_max_length: int = 256
    sample: int = 32
    check_every: int = 2
    asr: int | None = None
    judges: tuple[str, ...] = ("wei2024",)
    max_new_tokens: int = 64
    eval_batch_size: int = 16
    max_length: int = 512
    bf16: bool | None = None

    def __post_init__(self) -> None:
        check_grouping(self.scope, self.normalize, self.tokens)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds is {self.seeds}; it must be different numbers, at least one")
        for name in ("lr", "epochs", "patience"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be greater than 0")
        for name in ("max_steps", "asr", "sample"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")

    def steps(self, pools: Sequence[Sequence[Encoded]]) -> int:
        """Updates of the first arm; passes are those over the first pool."""
        of_batch = self.batch_size // len(pools)
        return self.max_steps or math.ceil(self.epochs * len(pools[0]) / of_batch)
