"""TRL's trainers on tiny models: a configuration, a few rows and a constructor for each.

Example: ``make("kto", model, folder, optimizers=plan.optimizers)`` is a ``KTOTrainer`` of two steps
whose optimiser is made from its own arguments.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import tiny_chat
import tiny_models
from transformers import LlamaForSequenceClassification, PreTrainedModel

PROMPTS = [f"w{3 + i} w{9 + i}" for i in range(8)]
GOOD = [f" w{20 + i} w7" for i in range(8)]
BAD = [f" w{40 + i} w8" for i in range(8)]


def lengths(completions: list[str], **_: Any) -> list[float]:
    """A reward that differs between answers: of each, a number from its letters."""
    return [float(sum(map(ord, text)) % 7) for text in completions]


class Kind(NamedTuple):
    """One trainer.

    Attributes:
        place: module, and the name that ends in Trainer and in Config.
        rows: of its data set.
        options: further ones of its configuration.
        given: further arguments of the trainer.
    """

    place: str
    rows: list[dict[str, Any]]
    options: dict[str, Any] = {}  # noqa: RUF012 (a NamedTuple has no class attributes)
    given: dict[str, Any] = {}  # noqa: RUF012


_PREFERENCES = [
    dict(zip(("prompt", "chosen", "rejected"), row, strict=True))
    for row in zip(PROMPTS, GOOD, BAD, strict=True)
]
_JUDGED = [
    {"prompt": row["prompt"], "completion": row[key], "label": key == "chosen"}
    for key in ("chosen", "rejected")
    for row in _PREFERENCES[:4]
]
_PROMPTS = [{"prompt": prompt} for prompt in PROMPTS]
# Answers of four tokens, in groups of two.
_GROUPS = {"max_completion_length": 4, "num_generations": 2, "temperature": 1.0}
_REWARDED = {"reward_funcs": lengths}

KINDS = {
    "sft": Kind("trl:SFT", [{"text": p + g} for p, g in zip(PROMPTS, GOOD, strict=True)]),
    "dpo": Kind("trl:DPO", _PREFERENCES),
    "kto": Kind("trl:KTO", _JUDGED),
    "reward": Kind("trl:Reward", _PREFERENCES),
    "grpo": Kind("trl:GRPO", _PROMPTS, _GROUPS, _REWARDED),
    "rloo": Kind("trl:RLOO", _PROMPTS, _GROUPS, _REWARDED),
    "online_dpo": Kind(
        "trl.experimental.online_dpo:OnlineDPO",
        _PROMPTS,
        {"max_new_tokens": 4, "missing_eos_penalty": None},
        _REWARDED,
    ),
    "cpo": Kind("trl.experimental.cpo:CPO", _PREFERENCES, {"max_length": 16}),
    "orpo": Kind("trl.experimental.orpo:ORPO", _PREFERENCES, {"max_length": 16}),
}


def build_model(kind: str) -> PreTrainedModel:
    """A tiny Llama; for rewards, one that gives a number."""
    model = tiny_models.build("llama")
    if kind != "reward":
        return model
    config = model.config
    config.num_labels, config.pad_token_id = 1, 0
    rewards = LlamaForSequenceClassification(config)
    rewards.model.load_state_dict(model.model.state_dict())
    return rewards.eval()


def make(
    kind: str,
    model: PreTrainedModel,
    folder: Path,
    *,
    optimizers: Callable[[Any], Any] | None = None,
    given: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A trainer.

    Args:
        kind: of `KINDS`.
        model: to be trained.
        folder: that it writes to.
        optimizers: of its configuration makes what it takes as ``optimizers=``.
        given: further arguments of the trainer.
        options: further ones of its configuration.
    """
    from datasets import Dataset

    if not model.config._name_or_path:  # where a trainer loads its reference from
        model.save_pretrained(folder / "base")
        model.config._name_or_path = str(folder / "base")
    place, rows, own, own_given = KINDS[kind]
    module, _, name = place.partition(":")
    library = importlib.import_module(module)
    defaults: dict[str, Any] = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "adam_beta1": 0.8,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "save_strategy": "no",
        "gradient_checkpointing": False,
    }
    args = getattr(library, f"{name}Config")(str(folder), **{**defaults, **own, **options})
    if optimizers is not None:
        given = {"optimizers": optimizers(args), **(given or {})}
    return getattr(library, f"{name}Trainer")(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_chat.word_tokenizer(),
        **own_given,
        **(given or {}),
    )
