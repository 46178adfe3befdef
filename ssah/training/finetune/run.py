"""Fine-tuning under a plan with ``transformers.Trainer``: running it, resuming it.

units = select_units(["scu", "cu:0.06"], groups)
plan = ssah.freeze(model, units)
fine_tune(plan, examples, "runs/tuned", Settings(lr=1e-5))

The folder of a run holds the update (``ssah.load_update``), ``run.json`` (what the run is, and once
it is finished how it ended), ``checkpoints`` while it is under way, and ``merged`` if asked for.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging

from ssah.compat.trainer import (
    PrinterCallback,
    SchedulerType,
    SealingTrainer,
    TrainerCallback,
    TrainingArguments,
    get_available_reporting_integrations,
    set_seed,
    training_arguments,
)
from ssah.data import Collator, fingerprint
from ssah.groups import GROUPS, UnitGroups
from ssah.storage import one_run
from ssah.training.finetune.checkpoints import CHECKPOINTS, last_sound, seal, step_of
from ssah.training.finetune.folder import check_folder, open_run, write_run
from ssah.training.plan import UpdatePlan
from ssah.training.saving import load_update
from ssah.units import UnitSet

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ssah.data import Encoded

__all__ = [
    "Settings",
    "count_parameters",
    "fine_tune",
    "optimizer_options",
    "select_units",
]

MERGED = "merged"
SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup")

_KEPT = 2  # checkpoints: should writing one be interrupted, the one before it is whole
# What does not change the weights that a run ends with: may be another when it is resumed.
_FREE = ("gradient_checkpointing", "save_steps", "logging_steps", "report_to")


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
        for name, above in (("lr", True), ("epochs", True), ("weight_decay", False)):
            _check_number(name, getattr(self, name), above_zero=above)
        _check_number("max_grad_norm", self.max_grad_norm, above_zero=False)
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio is {self.warmup_ratio}; it must be in [0, 1)")
        if self.lr_scheduler not in SCHEDULERS:
            raise ValueError(
                f"lr_scheduler is {self.lr_scheduler!r}; it must be one of {', '.join(SCHEDULERS)}"
            )
        for name in ("batch_size", "gradient_accumulation", "logging_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("save_steps", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps is {self.max_steps}; it must be at least 1 or None")
        available = get_available_reporting_integrations()
        missing = [name for name in self.report_to if name not in available]
        if missing:
            raise ValueError(
                f"report_to is {missing[0]!r}; it must be a tracker that is installed "
                f"({', '.join(available) or 'none is'})"
            )


def _check_number(name: str, value: float, *, above_zero: bool) -> None:
    if not math.isfinite(value) or value < 0 or (above_zero and value == 0):
        bound = "greater than 0" if above_zero else "at least 0"
        raise ValueError(f"{name} is {value}; it must be {bound}")


# ----------------------------------------------------------------------------------- selection


def select_units(selection: Sequence[str], groups: UnitGroups) -> UnitSet:
    """The units that a selection names: the union of its parts.

    Args:
        selection: group names such as ``"scu"``, or a group and a fraction of *all* units such as
            ``"cu:0.06"``: those of its units that are most like it (`UnitGroups.top` by
            ``"group"``; of CU, the highest for safety).
        groups: where they are taken from.

    Raises:
        ValueError: a part is neither, the group has fewer units, or nothing is selected.
    """
    units = UnitSet({}, groups.sizes)
    for part in selection:
        name, colon, share = part.partition(":")
        if name not in GROUPS:
            raise ValueError(
                f"the selection has {part!r}; it must be one of {', '.join(GROUPS)}, or a group "
                "and a fraction of all units such as cu:0.06"
            )
        own = groups.top(name, _fraction(part, share), by="group") if colon else groups[name]
        units = units | own
    if not len(units):
        raise ValueError(f"the selection {' '.join(selection)!r} has no units in these groups")
    return units


def _fraction(part: str, share: str) -> float:
    try:
        return float(share)
    except ValueError:
        raise ValueError(
            f"the selection has {part!r}; what follows the colon must be a fraction of all units, "
            "a number in [0, 1]"
        ) from None


# ------------------------------------------------------------------------------------ training


def fine_tune(
    plan: UpdatePlan,
    examples: Sequence[Encoded],
    out: str | os.PathLike[str],
    settings: Settings,
    *,
    tokenizer: PreTrainedTokenizerBase,
    eval_examples: Sequence[Encoded] | None = None,
    merge: bool = False,
    keep_checkpoints: bool = False,
) -> dict[str, Any]:
    """Train what ``plan`` trains, verify that the rest did not move, and save the update.

    A run that was interrupted goes on from its last checkpoint when it is called again with the
    same plan, data and settings, and ends with the weights of one that was not. A finished run is
    not repeated. Afterwards ``plan`` is closed and its model is the trained one.

    Args:
        plan: an active plan over a model with its original weights.
        examples: encoded rows to train on (`ssah.data.encode`).
        out: folder of the run.
        settings: how to train.
        tokenizer: pads batches, and is saved beside a merged model.
        eval_examples: rows whose loss is measured before and after training.
        merge: also save the whole model, to ``out/merged``.
        keep_checkpoints: do not remove checkpoints when the run is finished.

    Returns:
        plain data: ``parameters`` (as `count_parameters` gives them), ``steps``, ``epochs``,
        ``resumed_from`` (a step; 0 from the start), ``loss_first`` and ``loss_last`` (nats per
        token, the means of the first step and of those of the last log), ``eval_loss_before`` and
        ``eval_loss`` (None without ``eval_examples``), ``seconds`` (of this call),
        ``already_finished``, ``merged`` (the folder or None).

    Raises:
        ValueError: ``out`` holds another run (what differs is named) or something else, or a run
            is under way there, or its record or all of its checkpoints are damaged (the file is
            named); the weights are float16.
        OSError: the disk is full, or the like; what the last checkpoint has is kept.
        RuntimeError: the loss is not a number any more, or a frozen weight moved; nothing is
            saved then.
    """
    check_folder(out)
    folder, start = Path(out), time.perf_counter()
    parameters = count_parameters(plan)
    identity = _identity(plan, examples, settings)
    with one_run(folder):
        record = open_run(folder, identity)
        finished = "result" in record
        if finished:
            plan.close()
            load_update(plan.model, folder)
        else:
            trained = _train(plan, examples, folder, settings, tokenizer, eval_examples, record)
            plan.verify()
            plan.save_pretrained(folder)
            record["result"] = trained
            write_run(folder, record)
            plan.close()
        merged, checkpoints = folder / MERGED, folder / CHECKPOINTS
        if merge:
            tokenizer.save_pretrained(merged)
            plan.model.save_pretrained(merged)
        if checkpoints.is_dir() and not keep_checkpoints:
            shutil.rmtree(checkpoints)
    return {
        "parameters": parameters,
        **record["result"],
        "already_finished": finished,
        "seconds": time.perf_counter() - start,
        "merged": str(merged) if merged.is_dir() else None,
    }


def _train(
    plan: UpdatePlan,
    examples: Sequence[Encoded],
    folder: Path,
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    eval_examples: Sequence[Encoded] | None,
    record: dict[str, Any],
) -> dict[str, Any]:
    args = _arguments(plan.model, settings, folder)
    trainer = SealingTrainer(
        partial(seal, identity=record["identity"]),
        plan.model,
        args,
        data_collator=Collator(tokenizer),
        train_dataset=list(examples),
        eval_dataset=None if eval_examples is None else list(eval_examples),
        optimizer_cls_and_kwargs=plan.optimizer_cls_and_kwargs(
            args, **optimizer_options(plan, settings)
        ),
    )
    trainer.remove_callback(PrinterCallback)
    if eval_examples is not None and "eval_loss_before" not in record:
        record["eval_loss_before"] = trainer.evaluate()["eval_loss"]
        write_run(folder, record)
    checkpoint = last_sound(folder / CHECKPOINTS, record["identity"], _tell)
    # Measuring draws from the generator: training must begin with the same state either way.
    set_seed(settings.seed)
    with _progress() as progress:
        trainer.add_callback(_Monitor(progress))
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "resumed_from": 0 if checkpoint is None else step_of(checkpoint),
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "eval_loss_before": record.get("eval_loss_before"),
        "eval_loss": None if eval_examples is None else trainer.evaluate()["eval_loss"],
    }


def count_parameters(plan: UpdatePlan) -> dict[str, Any]:
    """``trained`` and ``all``, counts, and ``share`` in [0, 1]."""
    trained = sum(p.numel() for p in plan.parameters())
    return {"trained": trained, "all": plan.n_parameters, "share": trained / plan.n_parameters}


def optimizer_options(plan: UpdatePlan, settings: Settings) -> dict[str, Any]:
    """How the optimiser stores weights: float16 not at all; the plan rounds bfloat16."""
    dtypes = {p.dtype for p in plan.parameters()}
    if torch.float16 in dtypes:
        raise ValueError(
            "dtype is float16, in which small updates vanish; it must be float32 or bfloat16"
        )
    return {"seed": settings.seed} if torch.bfloat16 in dtypes else {}


def _arguments(model: PreTrainedModel, settings: Settings, folder: Path) -> TrainingArguments:
    if importlib.util.find_spec("accelerate") is None:
        raise ImportError("training needs the package accelerate: pip install accelerate")
    device = next(model.parameters()).device
    args = training_arguments(
        gradient_checkpointing=settings.gradient_checkpointing,
        output_dir=str(folder / CHECKPOINTS),
        run_name=folder.name,
        learning_rate=settings.lr,
        num_train_epochs=settings.epochs,
        max_steps=-1 if settings.max_steps is None else settings.max_steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup_ratio,
        lr_scheduler_type=SchedulerType(settings.lr_scheduler),
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.bf16,
        seed=settings.seed,
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or 500,
        save_total_limit=_KEPT,
        logging_steps=settings.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        report_to=list(settings.report_to) or "none",
        prediction_loss_only=True,
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type != "cpu",
    )
    if args.world_size > 1:
        raise ValueError(
            f"WORLD_SIZE is {args.world_size}; this command runs in one process: for several, use "
            "ssah.freeze or ssah.train_only in a script of your own"
        )
    own, theirs = ((d.type, d.index or 0) for d in (device, torch.device(args.device)))
    if own != theirs:
        raise ValueError(
            f"device is {device}; transformers trains on {args.device} here: choose another with "
            "CUDA_VISIBLE_DEVICES"
        )
    return args


class _Monitor(TrainerCallback):
    """Shows progress, logs the last step too, and stops when the loss is not a number."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.task: TaskID | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.task = self.progress.add_task(
            "training", total=state.max_steps, completed=state.global_step
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.task is not None:
            self.progress.update(self.task, completed=state.global_step)
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs.get("logs", {})
        if "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise RuntimeError(
                f"the loss is {logs['loss']} at step {state.global_step}: the run diverged and "
                "nothing was saved; a lower lr or a smaller max_grad_norm may help"
            )
        self.progress.console.print(
            f"step {state.global_step:>6}  loss {logs['loss']:.4f}"
            f"  lr {logs.get('learning_rate', 0.0):.2e}  grad norm {logs.get('grad_norm', 0.0):.3g}"
        )


def _tell(line: str) -> None:
    """A line for people, on standard error."""
    print(line, file=sys.stderr)


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on standard error."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # of transformers, at each checkpoint
    try:
        with Progress(*columns, console=Console(file=sys.stderr, highlight=False)) as progress:
            yield progress
    finally:
        if shown:
            logging.enable_progress_bar()


# ------------------------------------------------------------------------------------ resuming


def _identity(
    plan: UpdatePlan, examples: Sequence[Encoded], settings: Settings
) -> dict[str, str | int | float | bool | None]:
    """Everything that decides with which weights a run ends: argument -> value."""
    decisive = {name: v for name, v in asdict(settings).items() if name not in _FREE}
    return {
        "units of the model": plan.units_hash[:12],
        "trained units (groups and selection)": plan.fingerprint[:12],
        "model weights": str(plan.weights_hash)[:12],
        "data": fingerprint(examples)[:12],
        "dtype": str(plan.model.dtype).removeprefix("torch."),
        **decisive,
    }
