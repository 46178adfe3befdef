"""Training under a plan on pairs of answers, of which one is preferred.

Rafailov et al., NeurIPS 2023, arXiv 2305.18290 (DPO). With p the model, q the model before
training, and answers y (chosen) and z (rejected) to x:

    loss = -log sigmoid(beta (log p(y|x) / q(y|x) - log p(z|x) / q(z|x)))

Before the first update p is q, and the loss is log 2 = 0.69. Where p has made y twice and z half as
probable, the margin is log 4 = 1.39, and with beta = 1 the loss is log(1 + 1 / 4) = 0.22.

TRL's trainer computes it. The log-probabilities of q are taken before the first update, so that no
second model is held.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ssah.compat.trainer import PrinterCallback
from ssah.compat.trl import preference_trainer
from ssah.data import check_preferences
from ssah.models import quiet
from ssah.training.plan import UpdatePlan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def train_on_preferences(
    plan: UpdatePlan,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    *,
    steps: int,
    lr: float,
    batch_size: int = 8,
    beta: float = 0.1,
    max_length: int = 512,
    seed: int = 0,
) -> None:
    """Train what a plan lets train, in place, by AdamW at a constant rate; it verifies at the end.

    Args:
        plan: in force on the model, which is otherwise as it was when the plan was made. TRL's
            trainer changes how the model's ``forward`` is called: train a copy, or take only the
            weights.
        tokenizer: the model's; a chat template makes a conversation of each row.
        rows: with ``prompt``, ``chosen`` and ``rejected``, as `ssah.data.load_preferences` reads
            them: texts or turns.
        steps: updates.
        lr: learning rate.
        batch_size: pairs of an update.
        beta: how far the model may leave what it was: the less, the farther.
        max_length: the most tokens of prompt and answer; what is more is cut off.
        seed: of the order of rows.

    Raises:
        ImportError: trl is not installed.
        DataError: a row is no preference; it is named.
        RuntimeError: as of `UpdatePlan.verify`.
    """
    trainer_class, arguments = preference_trainer()
    examples = _examples(rows, conversation=tokenizer.chat_template is not None)
    from datasets import Dataset  # takes a second, and nothing else here needs it

    # Both write to standard error, and TRL sets the padding of the tokenizer that it is given.
    with quiet(), tempfile.TemporaryDirectory() as scratch:
        args = arguments(
            scratch,
            max_steps=steps,
            learning_rate=lr,
            lr_scheduler_type="constant",
            per_device_train_batch_size=batch_size,
            beta=beta,
            max_length=max_length,
            seed=seed,
            precompute_ref_log_probs=True,
            bf16=False,
            gradient_checkpointing=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=plan.model.device.type == "cpu",
        )
        trainer = trainer_class(
            model=plan.model,
            args=args,
            train_dataset=Dataset.from_list(examples),
            processing_class=copy.deepcopy(tokenizer),
            optimizers=plan.optimizers(args),
        )
        trainer.remove_callback(PrinterCallback)  # it prints the last log whatever is asked
        trainer.train()
    plan.model.eval()  # the trainer left it training
    plan.verify()


def _examples(rows: Sequence[Mapping[str, Any]], *, conversation: bool) -> list[dict[str, Any]]:
    """Rows as TRL takes them: turns, or texts of which the first one ends in a blank line."""
    pairs = check_preferences(rows)
    if conversation:
        return [dict(pair) for pair in pairs]
    return [
        {
            "prompt": "".join(f"{turn['content']}\n\n" for turn in pair["prompt"]),
            "chosen": pair["chosen"][0]["content"],
            "rejected": pair["rejected"][0]["content"],
        }
        for pair in pairs
    ]
