"""The one place where a ``transformers.Trainer`` is set up: one device a process, no surprises.

trainer = make_trainer(model, rows, tokenizer, "scratch", plan=plan, max_steps=100, bf16=True)
trainer.train()

Fine-tuning, and every study that trains, goes through here. What differs between them is given as
arguments under the names that transformers has for them.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ssah.compat.trainer import (
    PrinterCallback,
    SealingTrainer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    training_arguments,
)
from ssah.data import Collator
from ssah.distributed import Ranks
from ssah.training.plan import UpdatePlan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ssah.data import Encoded


def make_trainer(
    model: nn.Module,
    rows: Sequence[Encoded],
    tokenizer: PreTrainedTokenizerBase,
    folder: str | os.PathLike[str],
    *,
    plan: UpdatePlan | None = None,
    optimizer_options: Mapping[str, Any] | None = None,
    eval_rows: Sequence[Encoded] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    seal: Callable[[Path, tuple[str, ...]], None] | None = None,
    ranks: Ranks | None = None,
    drop_mask: bool = False,
    **arguments: Any,
) -> Trainer:
    """A trainer over encoded rows, on the device of ``model``; silent unless ``arguments`` say so.

    Args:
        model: what is trained; it may be a peft model.
        rows: encoded rows to train on.
        tokenizer: pads the batches.
        folder: where checkpoints go, if any are written.
        plan: the plan in force on the model: its optimiser is used. None: AdamW over everything
            that requires a gradient.
        optimizer_options: further ones of ``plan.optimizer_cls_and_kwargs``.
        eval_rows: encoded rows for ``trainer.evaluate()``.
        callbacks: further ones.
        seal: called with each checkpoint that is whole, see `ssah.compat.trainer.SealingTrainer`.
        ranks: those that train together, see `ssah.distributed.launched`; None: one process alone.
        drop_mask: leave the attention mask out, which is faster. Right only for a model that may do
            without (`ssah.attribution.may_drop_mask`).
        **arguments: of ``TrainingArguments``, and ``in_order=True``: rows in their order. Without
            them nothing is logged, saved or reported.

    Raises:
        ImportError: accelerate is not installed.
        ValueError: there are several processes and no ``ranks``, or transformers would train on
            another device than that of the model.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise ImportError("training needs the package accelerate: pip install 'ssah[train]'")
    device = next(model.parameters()).device
    # Without these transformers writes a checkpoint every 500 steps, and reports to what it finds.
    quiet = {"logging_strategy": "no", "save_strategy": "no", "report_to": "none"}
    args = training_arguments(
        output_dir=os.fspath(folder),
        optim="adamw_torch_fused",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type != "cpu",
        **(quiet | arguments),
    )
    _check_place(args, device, 1 if ranks is None else ranks.size)  # before the model is moved
    collator = Collator(tokenizer)
    options: dict[str, Any] = {
        "model": model,
        "args": args,
        "data_collator": _maskless(collator) if drop_mask else collator,
        "train_dataset": list(rows),
        "eval_dataset": None if eval_rows is None else list(eval_rows),
        "callbacks": list(callbacks),
    }
    if plan is not None:
        options["optimizer_cls_and_kwargs"] = plan.optimizer_cls_and_kwargs(
            args, **(optimizer_options or {})
        )
    if seal is None:
        trainer = Trainer(**options)
    else:
        trainer = SealingTrainer(seal, (ranks or Ranks()).agreeing, **options)
    # It prints every log as a dictionary; whoever wants to see them has a callback.
    trainer.remove_callback(PrinterCallback)
    return trainer


def _check_place(args: TrainingArguments, device: torch.device, processes: int) -> None:
    """So many processes, and the device that the model is on already."""
    if args.world_size != processes:
        raise ValueError(
            f"WORLD_SIZE is {args.world_size}; this command runs in one process: for several, use "
            "`ssah finetune` or `ssah align`, or ssah.freeze in a script of your own"
        )
    own, theirs = ((d.type, d.index or 0) for d in (device, torch.device(args.device)))
    if own != theirs:
        raise ValueError(
            f"device is {device}; transformers trains on {args.device} here: choose another with "
            "CUDA_VISIBLE_DEVICES"
        )


def _maskless(collator: Collator) -> Callable[[list[Any]], dict[str, Tensor]]:
    """Without the attention mask.

    Padding on the right is invisible to a causal model, whose labels there are -100, and attention
    without a mask is faster.
    """

    def collate(examples: list[Any]) -> dict[str, Tensor]:
        batch = collator(examples)
        del batch["attention_mask"]
        return batch

    return collate
