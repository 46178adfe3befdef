"""What a run leaves behind, and what it cannot leave where its model is sharded.

Example: of ``runs/tuned`` stay ``meta.json`` and tensors, the update; ``run.json``; and ``merged``,
the whole model, if it was asked for. ``checkpoints`` go with the end of the run.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssah.compat.trainer import keeps_whole_checkpoints
from ssah.distributed import Ranks
from ssah.training.finetune.checkpoints import CHECKPOINTS
from ssah.training.plan import UpdatePlan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ssah.compat.trainer import Trainer

MERGED = "merged"


def check_sharded_run(trainer: Trainer, eval_examples: Any, safety: Any, merge: bool) -> None:
    """Refuse, with ValueError, what is not done with a model that FSDP2 shards."""
    asked = {"eval_examples": eval_examples, "safety": safety, "merge": merge}
    for name, given in asked.items():
        if given:
            raise ValueError(
                f"{name} must be left out under FSDP2, which shards the model as training begins: "
                "train, then load the update into its base, to measure it or to save all of it"
            )
    if not keeps_whole_checkpoints(trainer):
        raise ValueError(
            "fsdp_state_dict_type is not FULL_STATE_DICT, must be: a checkpoint is sealed with the "
            "hash of each of its files"
        )


def save(plan: UpdatePlan, folder: Path, ranks: Ranks) -> None:
    """Write the update, once every rank has found that nothing frozen has moved."""
    with ranks.agreeing():
        plan.verify()
    with ranks.agreeing():
        if plan.ranks is not None or ranks.rank == 0:  # sharded, all put together what one writes
            plan.save_pretrained(folder)


def tidy(
    plan: UpdatePlan,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    merge: bool,
    keep_checkpoints: bool,
) -> None:
    """Write the whole model if asked for, and remove what only a run under way needs."""
    if merge:
        tokenizer.save_pretrained(folder / MERGED)
        plan.model.save_pretrained(folder / MERGED)
    if (folder / CHECKPOINTS).is_dir() and not keep_checkpoints:
        shutil.rmtree(folder / CHECKPOINTS)
