"""Options of trainers: what of ``TrainingArguments`` and of TRL's configurations works."""

from __future__ import annotations

from typing import Any

import tiny_models
import torch
import trl_trainers
from matrix.rows import Attempt, Proof, Setting, refused, works
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

from ssah.training import PlanCallback

TRAINER = "transformers.Trainer"
TRL = "TRL"


def trainer_of(
    setting: Setting, *, own: bool = False, callbacks: Any = None, **options: Any
) -> Trainer:
    """A Trainer of three steps; ``own``: it makes the optimiser that its arguments name."""
    defaults: dict[str, Any] = {
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = TrainingArguments(str(setting.folder), **{**defaults, **options})
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in tiny_models.rows((9,) * 12)]
    return Trainer(
        setting.model,
        args,
        train_dataset=rows,  # type: ignore[arg-type]
        eval_dataset=rows[:4],  # type: ignore[arg-type]
        callbacks=callbacks,
        optimizer_cls_and_kwargs=None if own else setting.plan.optimizer_cls_and_kwargs(args),
    )


def trained(**options: Any) -> Proof:
    def proof(setting: Setting) -> None:
        trainer_of(setting, **options).train()
        torch._dynamo.reset()

    return proof


OWN = "Give the Trainer no optimiser: its own holds the trained slices."
for name in ("adamw_torch_fused", "adafactor", "sgd", "adamw_bnb_8bit", "lion_32bit", "rmsprop"):
    works(TRAINER, f'`optim="{name}"`', OWN, exhaustive=name not in ("adafactor",))(
        trained(own=True, optim=name, adam_beta1=0.8)
    )
for situation, words, options in (
    ("`bf16=True`", "Autocast.", {"bf16": True}),
    ("`gradient_accumulation_steps=2`", "", {"gradient_accumulation_steps": 2}),
    (
        "`gradient_checkpointing=True`, reentrant",
        "",
        {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
        },
    ),
    ("`torch_compile=True`", "", {"torch_compile": True, "torch_compile_backend": "aot_eager"}),
    ("`neftune_noise_alpha=5`", "", {"neftune_noise_alpha": 5}),
    ("`label_smoothing_factor=0.1`", "", {"label_smoothing_factor": 0.1}),
    ("`auto_find_batch_size=True`", "", {"auto_find_batch_size": True}),
    (
        '`lr_scheduler_type="cosine"` with warmup',
        "",
        {"lr_scheduler_type": "cosine", "warmup_steps": 1},
    ),
    ("`max_grad_norm=0.1`", "", {"max_grad_norm": 0.1}),
    ('`eval_strategy="steps"`', "", {"eval_strategy": "steps", "eval_steps": 1}),
    (
        "early stopping",
        "",
        {
            "callbacks": [EarlyStoppingCallback(2)],
            "eval_strategy": "steps",
            "eval_steps": 1,
            "save_strategy": "steps",
            "save_steps": 1,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
        },
    ),
):
    works(TRAINER, situation, words, exhaustive=True)(trained(**options))


@refused(
    TRAINER,
    '`optim="adamw_8bit"` together with the plan\'s optimiser',
    "write plan.optimizer_cls_and_kwargs(args, state_dtype='8bit')",
    "One of the two would be passed over. Write that, or give the Trainer none of the plan's.",
)
def two_optimisers(setting: Setting) -> Attempt:
    return lambda: trainer_of(setting, optim="adamw_8bit")


@refused(
    TRAINER,
    "`bf16_full_eval=True`, then `plan.verify()`, as `PlanCallback` does",
    "another dtype",
    "The evaluation rounds the model itself, frozen weights too. Use `bf16=True`.",
)
def rounded_by_evaluation(setting: Setting) -> Attempt:
    trainer_of(setting, bf16_full_eval=True).evaluate()
    return setting.plan.verify


@refused(
    TRAINER,
    "`trainer.train()` again after the plan was closed",
    "train under no plan in force",
    "Make a plan, and a Trainer with it.",
)
def again(setting: Setting) -> Attempt:
    trainer = trainer_of(setting, max_steps=1)
    trainer.train()
    setting.plan.close()
    return trainer.train


@refused(
    TRAINER,
    "a model that the Trainer makes itself (`model_init=`)",
    "has the plan of another model",
    "Make the model, then the plan, and give the Trainer both.",
)
def made_anew(setting: Setting) -> Attempt:
    trainer = trainer_of(setting, callbacks=[PlanCallback(setting.plan)])
    trainer.model_init = lambda: tiny_models.build("llama")
    return trainer.train


# ------------------------------------------------------------------------------------------ TRL


def trl_trained(kind: str, **options: Any) -> Proof:
    def proof(setting: Setting) -> None:
        trl_trainers.make(
            kind, setting.model, setting.folder, optimizers=setting.plan.optimizers, **options
        ).train()

    return proof


for kind, situation, options in (
    (
        "sft",
        "SFT, `packing=True`",
        {"packing": True, "packing_strategy": "wrapped", "max_length": 8},
    ),
    ("sft", "SFT, `bf16=True`", {"bf16": True}),
    ("dpo", 'DPO, `loss_type="ipo"`', {"loss_type": ["ipo"]}),
    ("dpo", "DPO, `precompute_ref_log_probs=True`", {"precompute_ref_log_probs": True}),
    ("grpo", "GRPO with a reference, `beta=0.04`", {"beta": 0.04}),
    ("grpo", "GRPO, two updates a batch (`num_iterations=2`)", {"num_iterations": 2}),
):
    works(TRL, situation, "", exhaustive=True)(trl_trained(kind, **options))
