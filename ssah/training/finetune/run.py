"""Fine-tuning under a plan with ``transformers.Trainer``: running it, resuming it.

units = select_units(["scu", "cu:0.06"], groups)
plan = ssah.freeze(model, units)
fine_tune(plan, examples, "runs/tuned", Settings(lr=1e-5))

The folder of a run holds the update (``ssah.load_update``), ``run.json`` (what the run is, and once
it is finished how it ended), ``checkpoints`` while it is under way, and ``merged`` if asked for.

Several processes that a launcher started train together: each has its own rows of a batch, and the
first of them alone writes and tells. Example: ``batch_size=8`` on two ranks is 16 rows an update.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ssah.compat.accelerate import forget_prepared
from ssah.compat.trainer import SchedulerType, set_seed
from ssah.data import fingerprint
from ssah.distributed import Ranks
from ssah.storage import one_run
from ssah.training.finetune.checkpoints import CHECKPOINTS, last_sound, seal, step_of
from ssah.training.finetune.ending import MERGED, check_sharded_run, save, tidy
from ssah.training.finetune.folder import check_folder, open_run, write_run
from ssah.training.finetune.monitor import Monitor, progress_bar
from ssah.training.finetune.safety import SAFETY, SafetyMeasure, SafetyRecord
from ssah.training.finetune.settings import Settings
from ssah.training.finetune.trainer import make_trainer
from ssah.training.plan import UpdatePlan
from ssah.training.updates import load_update

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ssah.compat.trainer import Trainer
    from ssah.data import Encoded

_KEPT = 2  # checkpoints: should writing one be interrupted, the one before it is whole


def fine_tune(
    plan: UpdatePlan,
    examples: Sequence[Encoded],
    out: str | os.PathLike[str],
    settings: Settings,
    *,
    tokenizer: PreTrainedTokenizerBase,
    eval_examples: Sequence[Encoded] | None = None,
    safety: SafetyMeasure | None = None,
    merge: bool = False,
    keep_checkpoints: bool = False,
) -> dict[str, Any]:
    """Train what ``plan`` trains, verify that the rest did not move, and save the update.

    A run that was interrupted goes on from its last checkpoint when it is called again with the
    same plan, data and settings, and ends with the weights of one that was not. A finished run is
    not repeated. Afterwards ``plan`` is closed and its model is the trained one.

    Inside `ssah.distributed.launched` every rank calls this, each with the same model, plan and
    rows, and every rank ends with the same weights and returns the same.

    Args:
        plan: an active plan over a model with its original weights.
        examples: encoded rows to train on (`ssah.data.encode`).
        out: folder of the run.
        settings: how to train.
        tokenizer: pads batches, and is saved beside a merged model.
        eval_examples: rows whose loss is measured before and after training.
        safety: of the plan's model, measured before and after: `ssah.evaluation.Refusals`.
        merge: also save the whole model, to ``out/merged``.
        keep_checkpoints: do not remove checkpoints when the run is finished.

    Returns:
        plain data: ``parameters`` (as `count_parameters` gives them), ``steps``, ``epochs``,
        ``resumed_from`` (a step; 0 from the start), ``loss_first`` and ``loss_last`` (nats per
        token, the means of the first step and of those of the last log), ``eval_loss_before`` and
        ``eval_loss`` (None without ``eval_examples``), ``safety`` (``asked``, and what ``safety``
        found ``before`` and ``after``; None without it), ``seconds`` (of this call),
        ``already_finished``, ``merged`` (the folder or None).

    Raises:
        ValueError: ``out`` holds another run (what differs is named) or something else, or a run
            is under way there, or its record or all of its checkpoints are damaged (the file is
            named); ``safety`` is of another model; the weights are float16; ranks differ; something
            is asked for that is not done under FSDP2.
        OSError: the disk is full, or the like; what the last checkpoint has is kept.
        RuntimeError: the loss is not a number any more, or a frozen weight moved; nothing is
            saved then.
    """
    folder, start, ranks = Path(out), time.perf_counter(), Ranks.of()
    with ranks.agreeing():
        check_folder(out)
        if safety is not None and safety.model is not plan.model:
            raise ValueError(
                "safety measures another model than the plan's; both must have the same"
            )
        parameters = count_parameters(plan)
        identity = _identity(plan, examples, settings, ranks)
    ranks.common(**identity)
    with ExitStack() as stack:
        with ranks.agreeing():
            if ranks.rank == 0:  # it holds the folder for all of a launch
                stack.enter_context(one_run(folder))
        record = ranks.first(lambda: open_run(folder, identity))
        finished = "result" in record
        measured = None if safety is None else SafetyRecord(safety, folder, record, ranks)
        log = None
        if not finished:
            trainer = _trainer(plan, examples, folder, settings, tokenizer, eval_examples, identity)
            log = trainer.log
            if trainer.is_fsdp_enabled:
                with ranks.agreeing():
                    check_sharded_run(trainer, eval_examples, safety, merge)
        if measured is not None:
            measured.take("before", log)
        if finished:
            # The model still has the weights that the run began with: it gets those of its end.
            plan.close()
            load_update(plan.model, folder)
        else:
            record["result"] = _train(plan, trainer, folder, settings, record, ranks)
            save(plan, folder, ranks)
            # Last: a run is finished once its record says so, and only then is it not repeated.
            write_run(folder, record, ranks)
            plan.close()
        if measured is not None:  # of a finished run too, which nobody asked then
            measured.take("after", log)
        with ranks.agreeing():
            if ranks.rank == 0:
                tidy(plan, tokenizer, folder, merge=merge, keep_checkpoints=keep_checkpoints)
    merged = folder / MERGED
    return {
        "parameters": parameters,
        **record["result"],
        SAFETY: None if safety is None else record[SAFETY],
        "already_finished": finished,
        "seconds": time.perf_counter() - start,
        "merged": str(merged) if merged.is_dir() else None,
    }


def _trainer(
    plan: UpdatePlan,
    examples: Sequence[Encoded],
    folder: Path,
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    eval_examples: Sequence[Encoded] | None,
    identity: dict[str, Any],
) -> Trainer:
    return make_trainer(
        plan.model,
        examples,
        tokenizer,
        folder / CHECKPOINTS,
        plan=plan,
        optimizer_options=optimizer_options(plan, settings),
        eval_rows=eval_examples,
        seal=partial(seal, identity=identity),
        ranks=Ranks.of(),
        run_name=folder.name,
        learning_rate=settings.lr,
        num_train_epochs=settings.epochs,
        max_steps=-1 if settings.max_steps is None else settings.max_steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        gradient_checkpointing=settings.gradient_checkpointing,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup_ratio,  # below 1, transformers reads it as a share
        lr_scheduler_type=SchedulerType(settings.lr_scheduler),
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.bf16,
        seed=settings.seed,
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or 500,  # where nothing is saved, 0 would be refused
        save_total_limit=_KEPT,
        logging_strategy="steps",
        logging_steps=settings.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a loss that is not a number must be seen: it ends the run
        report_to=list(settings.report_to) or "none",
        prediction_loss_only=True,
    )


def _train(
    plan: UpdatePlan,
    trainer: Trainer,
    folder: Path,
    settings: Settings,
    record: dict[str, Any],
    ranks: Ranks,
) -> dict[str, Any]:
    """Train to the end, from the last sound checkpoint; returns the result of the run."""
    measured = trainer.eval_dataset is not None
    if measured and "eval_loss_before" not in record:
        record["eval_loss_before"] = trainer.evaluate()["eval_loss"]
        # At once: a run that is resumed cannot measure it any more.
        write_run(folder, record, ranks)
        if ranks.size > 1:
            forget_prepared(plan.model)
    checkpoint = ranks.first(lambda: _last_checkpoint(folder, record))
    # Measuring draws from the generator: training must begin with the same state either way.
    set_seed(settings.seed)
    with progress_bar(shown=ranks.rank == 0) as bar:
        trainer.add_callback(Monitor(bar))
        trainer.train(resume_from_checkpoint=checkpoint)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "resumed_from": 0 if checkpoint is None else step_of(Path(checkpoint)),
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "eval_loss_before": record.get("eval_loss_before"),
        "eval_loss": trainer.evaluate()["eval_loss"] if measured else None,
    }


def _last_checkpoint(folder: Path, record: dict[str, Any]) -> str | None:
    """The checkpoint to go on from, if there is one; what is not whole is removed."""
    found = last_sound(folder / CHECKPOINTS, record["identity"], _tell)
    return None if found is None else str(found)


def count_parameters(plan: UpdatePlan) -> dict[str, Any]:
    """``trained`` and ``all``, counts, and ``share`` in [0, 1]."""
    trained = sum(p.numel() for p in plan.parameters())
    return {"trained": trained, "all": plan.n_parameters, "share": trained / plan.n_parameters}


def optimizer_options(plan: UpdatePlan, settings: Settings) -> dict[str, Any]:
    """How the optimiser stores moments and weights; ValueError for weights in float16."""
    dtypes = {p.dtype for p in plan.parameters()}
    if torch.float16 in dtypes:
        raise ValueError(
            "dtype is float16, in which small updates vanish; it must be float32 or bfloat16"
        )
    options: dict[str, Any] = {}
    if settings.state_dtype != "float32":  # the optimiser's own default
        state = settings.state_dtype
        options["state_dtype"] = torch.bfloat16 if state == "bfloat16" else state
    # The seed is of stochastic rounding, which float32 weights do without.
    if torch.bfloat16 in dtypes:
        options["seed"] = settings.seed
    return options


def _identity(
    plan: UpdatePlan, examples: Sequence[Encoded], settings: Settings, ranks: Ranks
) -> dict[str, str | int | float | bool | None]:
    """Everything that decides with which weights a run ends: argument -> value."""
    # Each has its own rows of a batch. Runs of one process have never said so.
    processes = {"processes": ranks.size} if ranks.size > 1 else {}
    return {
        **processes,
        "units of the model": plan.units_hash[:12],
        "trained units (groups and selection)": plan.fingerprint[:12],
        "model weights": str(plan.weights_hash)[:12],
        "data": fingerprint(examples)[:12],
        "dtype": str(plan.model.dtype).removeprefix("torch."),
        **settings.decisive(),
    }


def _tell(line: str) -> None:
    """A line for people, on standard error."""
    print(line, file=sys.stderr)
