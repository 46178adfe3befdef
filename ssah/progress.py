"""Bars on standard error, where a command's result is not."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def scoring_bar(
    label: str, figure: str, total: int | None, completed: int = 0
) -> Iterator[Callable[[float], None]]:
    """A bar on standard error; yields a function that moves it on by one and shows a number.

    Args:
        label: before the bar.
        figure: how the number is shown, e.g. ``"{:,.0f} tokens/s"``.
        total: steps, or None if nobody knows.
        completed: steps that were done earlier, which is said.
    """
    # Here and not above: rich takes longer to import than a short run takes.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    shown = TextColumn("{task.fields[figure]}")
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), shown, TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        if completed:
            of = "" if total is None else f" of {total}"
            bar.console.print(f"{label}: {completed}{of} are done, going on after them")
        task = bar.add_task("", total=total, completed=completed, figure=figure.format(0.0))
        yield lambda number: bar.update(task, advance=1, figure=figure.format(number))


@contextmanager
def token_bar(total: int | None, done: int) -> Iterator[Callable[[int], None]]:
    """A bar over batches; yields a function that moves it on by one, of so many tokens."""
    start, seen = time.perf_counter(), 0  # of this run: what was done earlier took none of its time
    with scoring_bar("scoring units", "{:,.0f} tokens/s", total, done) as show:

        def advance(n_tokens: int) -> None:
            nonlocal seen
            seen += n_tokens
            show(seen / (time.perf_counter() - start))

        yield advance
