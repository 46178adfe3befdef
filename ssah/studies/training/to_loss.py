"""Training a model, or what a plan leaves of it, until the loss of fixed rows is low enough.

The training loss that decides is that of a sample of the training data, the same rows at every
measurement: no noise of batches is in it, so that arms can be compared at equal training loss.

It is measured after ``check_every`` updates, as many again, and from there on half way to where a
straight line through the last two measurements would reach the target. For example, with losses of
2.0 after 8 and 1.8 after 12 updates and a target of 1.4, the line reaches it 8 updates on, so that
the next measurement is after 4 of them. A loss that falls faster than the line does not overshoot,
and near the target every ``check_every`` updates are measured.

The last update is shortened until the loss is at most 0.005 nats below the target. A fraction f of
an update from weights a to weights b is a + f (b - a), as a lower learning rate would have had it;
f is found by bisection, to a 64th. Arms whose updates are of other sizes therefore end alike.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ssah.attribution import may_drop_mask
from ssah.compat.trainer import TrainerCallback
from ssah.data import Collator, Encoded, schedule
from ssah.evaluation import utility_loss
from ssah.training.finetune import make_trainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ssah.methods import TrainingSetup

_FARTHEST = 16  # updates from one measurement of the training loss to the next
_CLOSE = 0.005  # nats below the target at which the last update is no longer shortened
_FINEST = 1 / 64  # of an update, to which it is shortened


@dataclass(frozen=True)
class Recipe:
    """How to train: AdamW without decay, at a constant learning rate.

    Attributes:
        lr: the learning rate.
        batch_size: rows of an update.
        bf16: compute in bfloat16 by autocast; weights keep their dtype.
        seed: of the order of rows, and of dropout and rounding where there is any.
        check_every: the fewest updates from one measurement of the training loss to the next.
        max_grad_norm: what the norm of the gradient is clipped to.
    """

    lr: float
    batch_size: int
    bf16: bool
    seed: int
    check_every: int = 2
    max_grad_norm: float = 1.0


def train(
    setup: TrainingSetup,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pools: Sequence[Sequence[Encoded]],
    sample: Sequence[Encoded],
    recipe: Recipe,
    *,
    steps: int,
    target: float | None = None,
    advance: Callable[[int], None] = lambda step: None,
) -> dict[str, Any]:
    """Train in place for ``steps`` updates, or until the training loss is at most ``target``.

    Args:
        setup: what the trainer gets: ``model``, or a peft model over it, under a plan or not.
        model: whose loss is measured.
        tokenizer: the model's.
        pools: rows to train on; a batch has as many of each pool, see `ssah.data.row_order`. A
            setup with an order of its own is given those of the first pool.
        sample: rows of the training data.
        recipe: how to train.
        steps: the most updates.
        target: nats per response token; None: all steps are taken.
        advance: called with the number of updates done.

    Returns:
        ``steps``, ``last_step`` (the fraction of the last one that was taken), ``loss`` (of the
        sample, nats per token, at the end), ``reached`` (whether it is at most the target; None
        without one), ``losses`` (pairs of step and loss), ``tokens`` trained on, ``seconds``,
        ``parameters`` that trained (a count).

    Raises:
        FloatingPointError: the training loss is not finite: the run diverged.
    """
    if setup.order is None:
        rows = schedule(pools, recipe.batch_size, steps, recipe.seed)
    else:
        rows = setup.order(pools[0], recipe.batch_size, steps, recipe.seed)
    checks = _Checks(
        lambda: training_loss(model, tokenizer, sample, bf16=recipe.bf16),
        recipe.check_every,
        target,
        [parameter for parameter in setup.module.parameters() if parameter.requires_grad],
        advance,
    )
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = make_trainer(
            setup.module,
            rows,
            tokenizer,
            scratch,
            plan=setup.plan,
            # Those of the setup first: they may change the weights that are measured.
            callbacks=[*setup.callbacks, checks],
            drop_mask=may_drop_mask(model),
            in_order=True,
            learning_rate=recipe.lr * setup.lr_scale,
            lr_scheduler_type="constant",
            max_steps=steps,
            per_device_train_batch_size=recipe.batch_size,
            max_grad_norm=recipe.max_grad_norm,
            bf16=recipe.bf16,
            seed=recipe.seed,
        )
        trainer.train()
    model.eval()  # the trainer left it training
    done = trainer.state.global_step
    loss = checks.at(done)
    return {
        "steps": done,
        "last_step": checks.last_step,
        "loss": loss,
        "reached": None if target is None else loss <= target,
        "losses": checks.losses,
        "tokens": sum(len(row["input_ids"]) for row in rows[: done * recipe.batch_size]),
        "seconds": time.perf_counter() - start,
        "parameters": sum(parameter.numel() for parameter in checks.parameters),
    }


def training_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sample: Sequence[Encoded],
    *,
    bf16: bool,
    batch_size: int = 8,
) -> float:
    """Loss of the responses of encoded rows, nats per token.

    Args:
        model, tokenizer: what is measured.
        sample: the rows.
        bf16: compute in bfloat16 by autocast, as in training.
        batch_size: rows run at a time.
    """
    collator = Collator(tokenizer)
    # Longest first: little is padded, and what does not fit in memory is known at once.
    rows = sorted(sample, key=lambda row: -len(row["input_ids"]))
    batches = [
        collator(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)
    ]
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        return utility_loss(model, batches)


class _Checks(TrainerCallback):
    """Measures the training loss now and then, and stops the training where it is low enough."""

    def __init__(
        self,
        measure: Callable[[], float],
        every: int,
        target: float | None,
        parameters: Sequence[nn.Parameter],
        advance: Callable[[int], None],
    ) -> None:
        self.measure, self.every, self.target, self.advance = measure, every, target, advance
        self.parameters = parameters  # that train
        self.losses: list[tuple[int, float]] = []
        self.next = every  # the update after which the loss is measured again
        self.last_step = 1.0
        self._before: list[Tensor] = []

    def at(self, step: int) -> float:
        """The loss after ``step`` updates, measured now unless it has just been."""
        if not self.losses or self.losses[-1][0] != step:
            self.losses.append((step, self.measure()))
        return self.losses[-1][1]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Only of an update that may be the last: the copy is as large as all that trains.
        if self.target is not None and state.global_step + 1 >= self.next:
            self._before = [parameter.detach().clone() for parameter in self.parameters]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.advance(state.global_step)
        if self.target is None or state.global_step < self.next:
            return
        loss = self.at(state.global_step)
        if loss <= self.target:
            self._shorten(self.target)
            control.should_training_stop = True
            return
        wait = self.every
        if len(self.losses) > 1:
            (before, higher), (now, lower) = self.losses[-2:]
            if higher > lower:  # a line that rises reaches no lower loss
                wait = int((lower - self.target) * (now - before) / (higher - lower) / 2)
        self.next = state.global_step + min(max(wait, self.every), _FARTHEST)

    @torch.no_grad()
    def _shorten(self, target: float) -> None:
        """Take back as much of the update just taken as leaves the loss at the target."""
        step, loss = self.losses[-1]
        after = [parameter.detach().clone() for parameter in self.parameters]
        low, high = 0.0, 1.0  # fractions whose loss is above and at most the target

        def take(fraction: float) -> None:
            for parameter, old, new in zip(self.parameters, self._before, after, strict=True):
                parameter.copy_(torch.lerp(old, new, fraction))

        while target - loss > _CLOSE and high - low > _FINEST:
            middle = (low + high) / 2
            take(middle)
            found = self.measure()
            if found <= target:
                high, loss = middle, found
            else:
                low = middle
        take(high)
        self.last_step, self.losses[-1] = high, (step, loss)
