"""Training under a plan on encoded rows, for a few updates: AdamW at a constant rate, no decay.

Example: 50 refusals in batches of 8 are ceil(50 / 8) = 7 updates a pass; the last batch of a pass
is filled up with rows of the next one.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ssah.data import Encoded, schedule
from ssah.training.finetune import make_trainer
from ssah.training.plan import UpdatePlan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def train_on_rows(
    plan: UpdatePlan,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Encoded],
    *,
    epochs: int,
    lr: float,
    batch_size: int = 8,
    seed: int = 0,
) -> None:
    """Train what a plan lets train, in place; it verifies at the end.

    Args:
        plan: in force on the model.
        tokenizer: the model's, which pads the batches.
        rows: encoded, as `ssah.data.encode` gives them.
        epochs: passes over the rows.
        lr: learning rate.
        batch_size: rows of an update.
        seed: of the order of rows.

    Raises:
        ImportError: accelerate is not installed.
        RuntimeError: as of `UpdatePlan.verify`.
    """
    steps = epochs * math.ceil(len(rows) / batch_size)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = make_trainer(
            plan.model,
            schedule([rows], batch_size, steps, seed),
            tokenizer,
            scratch,
            plan=plan,
            in_order=True,
            learning_rate=lr,
            lr_scheduler_type="constant",
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            seed=seed,
        )
        trainer.train()
    plan.model.eval()  # the trainer left it training
    plan.verify()
