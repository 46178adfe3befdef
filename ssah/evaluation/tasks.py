"""Multiple-choice tasks, through EleutherAI's lm-eval (``pip install 'ssah[eval]'``)."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssah.evaluation.attacks import rate
from ssah.models import as_it_was

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["check_tasks", "multiple_choice"]

_METRICS = ("acc", "acc_norm")  # lm-eval's names


def multiple_choice(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    folder: str | os.PathLike[str] | None = None,
    manager: Any = None,
    limit: int | None = None,
    batch_size: int = 8,
    level: float = 0.95,
) -> dict[str, Any]:
    """Accuracy on tasks of lm-eval.

    Inside ``ssah.ablate(...)`` the ablated model is measured. lm-eval's own tasks fetch their data
    from the hub; a task whose YAML names local data (``dataset_path: json`` with ``data_files``)
    needs no network.

    Args:
        model: a causal language model of transformers; it is left as it was.
        tokenizer: the model's.
        tasks: names of tasks or of groups of tasks.
        folder: with YAML files of further tasks.
        manager: what :func:`check_tasks` returned for the same tasks and folder, where they are
            measured more than once: reading lm-eval's catalogue takes a while.
        limit: questions of each task; None: all.
        batch_size: sequences run at a time.
        level: of the intervals, a fraction in (0, 1).

    Returns:
        Plain data: task -> ``accuracy``, and ``accuracy_norm`` where the task has it (lm-eval's
        ``acc_norm``: log-probabilities divided by the answer's length in bytes), each a rate with
        its Wilson interval.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: there is no such task, or it is not one of choices.
    """
    manager = manager or check_tasks(tasks, folder)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with as_it_was(model):
        found = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            bootstrap_iters=0,  # intervals are Wilson's, from the samples
            log_samples=True,
            random_seed=None,  # else the caller's generators are seeded anew
            numpy_random_seed=None,
            torch_random_seed=None,
        )
    result = {}  # of a group of tasks, each of its tasks
    for task, samples in found["samples"].items():
        accuracy = {
            metric.replace("acc", "accuracy"): rate([s[metric] for s in samples], level)
            for metric in _METRICS
            if all(metric in sample for sample in samples)
        }
        if not accuracy:
            raise ValueError(f"task {task!r} has no accuracy, must be one of multiple choice")
        result[task] = accuracy
    return result


def check_tasks(tasks: Sequence[str], folder: str | os.PathLike[str] | None = None) -> Any:
    """A catalogue that has all ``tasks``: the folder's, or lm-eval's with what the folder adds.

    Raises:
        ImportError, ValueError, FileNotFoundError: as :func:`multiple_choice` describes.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError(
            "multiple-choice tasks need lm-eval, which is not installed: pip install 'ssah[eval]'"
        )
    if isinstance(tasks, str) or not tasks:
        raise ValueError(f"tasks is {tasks!r}, must be a list with at least one task")
    if folder is not None and not Path(folder).is_dir():
        raise FileNotFoundError(f"folder of tasks is {str(folder)!r}, which is no folder")
    from lm_eval.tasks import TaskManager

    if folder is not None:
        # The folder alone first: lm-eval's own catalogue has thousands of files to read.
        own = TaskManager(include_path=str(folder), include_defaults=False)
        if set(tasks) <= set(own.all_subtasks):
            return own
    manager = TaskManager(include_path=None if folder is None else str(folder))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        where = "" if folder is None else f", nor of the folder {str(folder)!r}"
        raise ValueError(f"tasks has {unknown}, which are no tasks of lm-eval{where}")
    return manager
