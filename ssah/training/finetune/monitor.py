"""What a person sees of a run: a bar, a line for each log, and the end of a run that diverged."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from ssah.compat.trainer import TrainerCallback

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Monitor(TrainerCallback):
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
        # Trainer logs every so many steps; the result of a run is the loss of its last ones.
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Print what the trainer logs; RuntimeError where the loss is NaN or infinite."""
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


@contextmanager
def progress_bar(*, shown: bool = True) -> Iterator[Progress]:
    """A bar on standard error, in place of those of transformers; or none and no line at all."""
    from rich import progress as rich
    from rich.console import Console

    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
        rich.TimeRemainingColumn(),
    )
    theirs = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # transformers draws one for each checkpoint that it writes
    try:
        console = Console(stderr=True, highlight=False, quiet=not shown)
        with rich.Progress(*columns, console=console, disable=not shown) as progress:
            yield progress
    finally:
        if theirs:
            logging.enable_progress_bar()
