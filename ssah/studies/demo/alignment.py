"""A quick alignment on refusals, for the demonstration: minutes, not a recipe for real models."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch

from ssah.data import Encoded, Row, encode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_HALF = 4  # refusals in a batch, and ordinary answers
_MAX_LENGTH = 192
_LEARNING_RATE = 1e-4
_MAX_STEPS = 200


def align(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    refusals: Sequence[Row],
    answers: Sequence[Row],
    *,
    seconds: float,
    scratch: Path,
    mixed_precision: bool,
    advance: Callable[[float], None],
) -> dict[str, Any]:
    """Train a model, in place, to refuse harmful requests and still answer ordinary ones.

    `transformers.Trainer` on batches of which half are refusals; the embeddings stay as they are.
    No checkpoint is written.

    Args:
        model: float32 weights.
        tokenizer: the model's.
        refusals, answers: rows as ``ssah.data.load_rows`` returns them.
        seconds: the most that training takes: it ends before a step that might take it beyond.
        scratch: a folder that the trainer may use.
        mixed_precision: run the model under bfloat16 autocast.
        advance: called after each step with the seconds since the start.

    Returns:
        ``steps``, ``seconds``, ``rows`` and ``tokens`` seen, as plain data.
    """
    # Here, because it loads many packages, and a demonstration without alignment needs none.
    from ssah.compat.trainer import TrainerCallback
    from ssah.training.finetune import make_trainer

    class Deadline(TrainerCallback):
        def __init__(self) -> None:
            self.last = self.longest = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            elapsed = time.perf_counter() - start
            # The next step may take as long as the longest so far: its batch has longer rows.
            self.longest = max(self.longest, elapsed - self.last)
            self.last = elapsed
            advance(elapsed)
            if elapsed + self.longest > seconds:
                control.should_training_stop = True

    examples = _mixed(
        list(encode(refusals, tokenizer, max_length=_MAX_LENGTH)),
        list(encode(answers, tokenizer, max_length=_MAX_LENGTH)),
    )
    trainer = make_trainer(
        model,
        examples,
        tokenizer,
        scratch,
        callbacks=[Deadline()],
        drop_mask=True,  # padding on the right is invisible to a causal model
        in_order=True,
        per_device_train_batch_size=2 * _HALF,
        max_steps=_MAX_STEPS,
        learning_rate=_LEARNING_RATE,
        lr_scheduler_type="constant",
        bf16=mixed_precision,
        seed=0,
    )
    start = time.perf_counter()
    with _embeddings_frozen(model):
        trainer.train()
    steps = trainer.state.global_step
    seen = [examples[i % len(examples)] for i in range(steps * 2 * _HALF)]
    return {
        "steps": steps,
        "seconds": time.perf_counter() - start,
        "rows": len(seen),
        "tokens": sum(len(example["input_ids"]) for example in seen),
        "learning_rate": _LEARNING_RATE,
    }


@contextmanager
def _embeddings_frozen(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block the embeddings need no gradient; after it no gradient is left at all."""
    # A fifth of SmolLM2-135M, whose gradients take time and are not needed to learn to refuse.
    embeddings = model.get_input_embeddings().weight
    assert isinstance(embeddings, torch.nn.Parameter)
    embeddings.requires_grad_(False)
    try:
        yield
    finally:
        embeddings.requires_grad_(True)
        model.eval()
        model.zero_grad(set_to_none=True)


def _mixed(refusals: list[Encoded], answers: list[Encoded]) -> list[Encoded]:
    """Rows in the order of training: every batch has half of each, all of similar length.

    Both are sorted by length and cut into as many chunks; chunk k of one meets chunk k of the
    other, so that little is padded. The order of the batches is shuffled.
    """
    n = max(1, max(len(refusals), len(answers)) // _HALF)
    pools = [_chunks(refusals, n), _chunks(answers, n)]
    order = list(range(n))  # of batches, now from the shortest rows to the longest
    Random(0).shuffle(order)
    return [row for k in order for pool in pools for row in pool[k]]


def _chunks(rows: list[Encoded], n: int) -> list[list[Encoded]]:
    """``n`` chunks of rows of similar length; rows repeat where there are too few."""
    random = Random(0)
    pool = list(rows)
    while len(pool) < n * _HALF:
        pool += random.sample(rows, min(len(rows), n * _HALF - len(pool)))
    pool = sorted(pool[: n * _HALF], key=lambda row: len(row["input_ids"]))
    return [pool[k * _HALF : (k + 1) * _HALF] for k in range(n)]
